"""
Fine-tune a model with LoRA that starts where the full gradient points.

    accelerate launch recipes/finetune.py --config recipes/configs/quickstart.yaml

Any value of the YAML file can be given on the command line too, where it wins: `--max_steps 20`. `--help` lists them.
"""

import json
from pathlib import Path

from finetuning.arguments import parse
from finetuning.cpu import adapt_to_cpu
from finetuning.data import load_data
from finetuning.evaluation import add_perplexity, headline
from finetuning.models import load_model, load_tokenizer, make_lora_config
from finetuning.processes import end_processes
from finetuning.training import make_trainer
from transformers import set_seed


def main() -> None:
    model_args, data_args, lora_args, lora_ga_config, training_args = parse()
    adapt_to_cpu(training_args)
    set_seed(training_args.seed)
    task = model_args.task

    # Data
    tokenizer = load_tokenizer(model_args)
    with training_args.main_process_first(desc="reading the data"):
        data = load_data(data_args, task, tokenizer)
    if training_args.process_index == 0:
        print(f"training on {len(data.train)} rows, {0 if data.eval is None else len(data.eval)} held out")

    # Model
    model = load_model(model_args, tokenizer, data.class_names)

    # Trainer
    trainer = make_trainer(
        task, model, training_args, data, tokenizer, lora_ga_config, make_lora_config(lora_args, task)
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
        if trainer.lora_ga_rate_report is not None:  # with `--find_learning_rate true`
            print(trainer.lora_ga_rate_report.summary())
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
    end_processes()
