"""
Fine-tune a causal model with TRL's SFTTrainer and a LoRA adapter that starts where the full gradient points.

    accelerate launch recipes/sft_trl.py --config recipes/configs/sft_trl.yaml --dataset_name trl-lib/Capybara

Rows are what TRL takes: `messages`, or `prompt` and `completion`, or `text`. The model is TRL's `ModelConfig`
(`--load_in_4bit true` for QLoRA), the training its `SFTConfig` (`--packing true`, `--max_length`). Any value of the
YAML file can be given on the command line too, where it wins. `--help` lists them.
"""

from pathlib import Path

from finetuning.arguments import SourceArguments, parse
from finetuning.cpu import adapt_to_cpu
from finetuning.data import load_rows
from finetuning.package_paths import resolve_reference
from finetuning.processes import end_processes
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from lora_ga_trainer import LoRAGAConfig, LoRAGAMixin


ARGUMENTS = (ModelConfig, SourceArguments, LoRAGAConfig, SFTConfig)


class LoRAGASFTTrainer(LoRAGAMixin, SFTTrainer):
    """TRL's SFTTrainer with a gradient-aligned start."""


def main() -> None:
    model_config, source_args, lora_ga_config, sft_config = parse(types=ARGUMENTS)
    adapt_to_cpu(sft_config)
    model_config.use_peft = True
    sft_config.model_init_kwargs = {
        "revision": model_config.model_revision,
        "dtype": model_config.dtype,
        "attn_implementation": model_config.attn_implementation,
        **(sft_config.model_init_kwargs or {}),
    }

    # Data
    with sft_config.main_process_first(desc="reading the data"):
        train, held_out = load_rows(source_args)

    # Trainer
    trainer = LoRAGASFTTrainer(
        resolve_reference(model_config.model_name_or_path),
        sft_config,
        train_dataset=train,
        eval_dataset=held_out,
        quantization_config=get_quantization_config(model_config),
        peft_config=get_peft_config(model_config),
        lora_ga_config=lora_ga_config,
    )

    # Train
    metrics = trainer.train(resume_from_checkpoint=sft_config.resume_from_checkpoint).metrics
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)

    # Save
    trainer.save_model()
    if sft_config.push_to_hub:
        trainer.push_to_hub(dataset_name=source_args.dataset_name)
    if trainer.is_world_process_zero():
        if trainer.lora_ga_report is not None:  # there is none with `--init none`, nor after resuming
            print(trainer.lora_ga_report.summary())
        if trainer.lora_ga_rate_report is not None:  # with `--find_learning_rate true`
            print(trainer.lora_ga_rate_report.summary())
        print(f"adapter saved to {Path(sft_config.output_dir).resolve()}")

    # Evaluate
    if held_out is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
    end_processes()
