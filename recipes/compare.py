"""
Compare ways to fine-tune on one task, each at its own best learning rate.

    accelerate launch recipes/compare.py --config recipes/configs/compare_quickstart.yaml --arms lora,lora_ga,full

Every arm gets the same steps a run and a learning-rate sweep of its own; the best rate is then run with the other
seeds. A best rate at an end of its sweep does not win: the sweep is extended there. A comparison that was cut off goes
on where it stopped. `--plan_only true` says what it would cost. `comparison/methods.py` lists the methods.
"""

from pathlib import Path

from comparison.arms import parse_arms
from comparison.outcome import draw, reference_loss, shown_metric, to_json, to_table
from comparison.plan import describe_plan
from comparison.run import Task
from comparison.scheduler import Comparison
from comparison.settings import CompareArguments, require_comparable, settings_of
from comparison.store import Store, write_whole
from finetuning.arguments import ARGUMENTS, parse
from finetuning.cpu import adapt_to_cpu
from finetuning.data import load_data
from finetuning.models import load_model, load_tokenizer
from finetuning.processes import end_processes
from finetuning.training import make_collator, make_trainer


def main() -> None:
    model_args, data_args, lora_args, config, args, compare = parse(types=(*ARGUMENTS, CompareArguments))
    require_comparable(compare, args)
    arms = parse_arms(compare.arms, config, lora_args)
    adapt_to_cpu(args)
    folder = Path(args.output_dir)
    store = Store(folder, settings_of(model_args, data_args, lora_args, config, args, compare))

    # Data and model
    tokenizer = load_tokenizer(model_args)
    with args.main_process_first(desc="reading the data"):
        data = load_data(data_args, model_args.task, tokenizer)
    if data.eval is None:
        raise ValueError("eval_fraction=0.0: a comparison needs held-out rows. Give eval_file, or a fraction.")
    task = Task(
        name=model_args.task,
        data=data,
        collate=make_collator(model_args.task, tokenizer),
        args=args,
        load_model=lambda: load_model(model_args, tokenizer, data.class_names),
        make_trainer=lambda model, run_args, run_config: make_trainer(
            model_args.task, model, run_args, data, tokenizer, run_config
        ),
        folder=folder,
    )

    # Plan
    if args.process_index == 0:
        store.open()
    comparison = Comparison(arms, compare, task, store)
    trial = lambda: comparison.run(arms[0], compare.rates[0], compare.seeds[0], points=1, steps=3)
    plan = describe_plan(arms, compare, comparison.results, args.max_steps, trial)
    if comparison.is_main:
        print(plan, flush=True)
    if compare.plan_only:
        return

    # Run and report
    rows = comparison.finish()
    if comparison.is_main:
        table = to_table(rows, shown_metric(rows, comparison.metric), reference_loss(rows))
        write_whole(folder / "comparison.json", to_json(rows, comparison.metric, store.settings))
        (folder / "comparison.md").write_text(table + "\n", encoding="utf-8")
        draw(rows, folder / "comparison.png")
        print(table)
        print(f"table, curves and figures are in {folder.resolve()}")


if __name__ == "__main__":
    main()
    end_processes()
