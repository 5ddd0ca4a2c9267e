"""
Plan the rank of each layer's adapter under a number of parameters, and show what each rule would do with them.

    python recipes/plan_ranks.py --config recipes/configs/quickstart.yaml --rules energy signal

Model, data and adapter are those of the YAML file of `finetune.py`, and every value of it can be given here, too. The
budget is that of its `lora_r` unless `--budget` names another. Nothing is trained. For each rule a table of ranks by
block and kind of layer is printed, and `rank_plan_RULE.json` and `.png` are written to `output_dir`. To train with a
plan, give `--ranks auto --rank_rule RULE --rank_budget BUDGET` to `finetune.py`.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

from finetuning.arguments import parse
from finetuning.cpu import adapt_to_cpu
from finetuning.data import load_data
from finetuning.models import load_model, load_tokenizer, make_lora_config
from finetuning.training import make_trainer
from transformers import set_seed

from lora_ga_trainer import RULES, plan_ranks


def main() -> None:
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--budget", type=int, help="parameters of the adapter, or bytes with --in_bytes")
    parser.add_argument("--in_bytes", action="store_true")
    own, others = parser.parse_known_args(sys.argv[1:])
    model_args, data_args, lora_args, lora_ga_config, training_args = parse(others)
    adapt_to_cpu(training_args)
    set_seed(training_args.seed)
    task = model_args.task

    tokenizer = load_tokenizer(model_args)
    data = load_data(data_args, task, tokenizer)
    model = load_model(model_args, tokenizer, data.class_names)
    lora = make_lora_config(lora_args, task)
    trainer = make_trainer(task, model, training_args, data, tokenizer, lora_ga_config, lora)

    folder = Path(training_args.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for rule in own.rules:
        plan = plan_ranks(trainer, own.budget, rule, in_bytes=own.in_bytes)
        print(f"\n{plan.summary()}\n\n{plan.table()}", flush=True)
        plan.to_json(folder / f"rank_plan_{rule}.json")
        plan.plot(folder / f"rank_plan_{rule}.png")


if __name__ == "__main__":
    main()
