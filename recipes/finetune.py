"""
Fine-tune a model with LoRA that starts where the full gradient points.

    accelerate launch recipes/finetune.py --config recipes/configs/quickstart.yaml

Any value of the YAML file can be given on the command line too, where it wins: `--max_steps 20`. `--help` lists them.
"""

import json
from pathlib import Path

from arguments import parse
from data import load_data
from evaluation import add_perplexity, evaluation_functions, headline
from models import load_model, load_tokenizer, make_lora_config
from threads import use_all_cores
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, set_seed

from lora_ga_trainer import LoRAGATrainer, Seq2SeqLoRAGATrainer


def main() -> None:
    model_args, data_args, lora_args, lora_ga_config, training_args = parse()
    use_all_cores(training_args)
    set_seed(training_args.seed)
    task = model_args.task

    # Data
    tokenizer = load_tokenizer(model_args)
    with training_args.main_process_first(desc="reading the data"):
        data = load_data(data_args, task, tokenizer)

    # Model
    model = load_model(model_args, tokenizer, data.class_names)

    # Trainer
    classifies = task == "sequence-classification"
    collator = DataCollatorWithPadding(tokenizer) if classifies else DataCollatorForSeq2Seq(tokenizer, model)
    trainer_class = Seq2SeqLoRAGATrainer if task == "seq2seq" else LoRAGATrainer
    trainer = trainer_class(
        model,
        training_args,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
        data_collator=collator,
        peft_config=make_lora_config(lora_args, task),
        lora_ga_config=lora_ga_config,
        **evaluation_functions(task, tokenizer, training_args.predict_with_generate),
    )

    # Train
    metrics = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint).metrics
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)

    # Save
    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        folder = Path(training_args.output_dir).resolve()
        if data.class_names is not None:
            (folder / "class_names.json").write_text(json.dumps(data.class_names) + "\n", encoding="utf-8")
        if trainer.lora_ga_report is not None:  # there is none with `--init none`, nor after resuming
            trainer.lora_ga_report.to_json(folder / "lora_ga_report.json")
            print(trainer.lora_ga_report.summary())
        print(f"adapter saved to {folder}")

    # Evaluate
    if data.eval is not None:
        metrics = add_perplexity(trainer.evaluate(), task)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        if trainer.is_world_process_zero():
            print(headline(metrics))


if __name__ == "__main__":
    main()
