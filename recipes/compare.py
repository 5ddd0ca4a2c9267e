"""
Compare ways to fine-tune on one task, each at its own best learning rate.

    accelerate launch recipes/compare.py --config recipes/configs/compare_quickstart.yaml --arms lora,lora_ga,full

Every arm gets the same steps a run and a learning-rate sweep of its own; the best rate is then run with the other
seeds. A best rate at an end of its sweep is no winner: the sweep is extended there. A comparison that was cut off goes
on where it stopped. `--plan_only true` says what it would cost. `comparison/methods.py` lists the methods.
"""

import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from accelerate.utils import broadcast_object_list
from arguments import parse
from comparison.arms import Arm, parse_arms
from comparison.outcome import Row, draw, reference_loss, shown_metric, to_json, to_table
from comparison.plan import describe_plan
from comparison.run import Result, Task, run_arm
from comparison.settings import CompareArguments, metric_of, require_comparable
from comparison.store import Store, write_whole
from comparison.sweep import Sweep, Verdict, judge
from data import load_data
from models import load_model, load_tokenizer
from tqdm.auto import tqdm
from training import adapt_to_cpu, make_collator, make_trainer


# Training arguments that change what a run gives; the others may differ when a comparison goes on.
TRAINING = (
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "data_seed",
    "world_size",
)


class Comparison:
    """
    All arms on one task: what is done, what is left, what came out.

    Args:
        arms: what is compared.
        compare: the budget.
        task: what all runs share.
        store: where results are kept.
    """

    def __init__(self, arms: Sequence[Arm], compare: CompareArguments, task: Task, store: Store) -> None:
        self.arms, self.compare, self.task, self.store = arms, compare, task, store
        self.metric, self.sign = metric_of(task.args)
        self.sweeps = {
            arm.name: Sweep(
                tuple(float(f"{rate * arm.rate_factor:.6g}") for rate in compare.rates),
                tuple(compare.seeds),
                compare.max_extensions,
            )
            for arm in arms
        }
        self.is_main = task.args.process_index == 0
        self.results = [_shared(result) for result in _shared(store.load() if self.is_main else None)]

    def score(self, result: Result) -> float:
        """Return what decides between rates: less is better."""
        last = result.evals[-1]
        if self.metric not in last:
            known = ", ".join(name for name in last if name.startswith("eval_"))
            raise ValueError(f"metric_for_best_model: there is no {self.metric!r} among {known}.")
        return self.sign * last[self.metric]

    def scores(self, arm: Arm) -> dict[tuple[float, int], float]:
        return {(r.rate, r.seed): self.score(r) for r in self.results if r.arm == arm.name}

    def verdict(self, arm: Arm) -> Verdict:
        return judge(self.sweeps[arm.name], self.scores(arm))

    def todo(self) -> list[tuple[Arm, float, int]]:
        """List the runs that can be told now, all sweeps before the further seeds."""
        runs = [(arm, rate, seed) for arm in self.arms for rate, seed in self.verdict(arm).todo]
        return sorted(runs, key=lambda run: run[2] != self.compare.seeds[0])

    def run(self, arm: Arm, rate: float, seed: int, points: int, steps: int | None = None) -> Result:
        """Make one run; every process gets the result of the first one, so that all decide alike."""
        return _shared(run_arm(self.task, arm, rate, seed, points, steps))

    def finish(self) -> list[Row]:
        """Make every run that is left and return one row an arm."""
        with tqdm(desc="runs", disable=not self.is_main, initial=len(self.results)) as bar:
            while todo := self.todo():
                bar.total = len(self.results) + len(todo)
                arm, rate, seed = todo[0]
                bar.set_postfix_str(f"{arm.name}, rate {rate:g}, seed {seed}")
                result = self.run(arm, rate, seed, self.compare.eval_points)
                if self.is_main:
                    self.store.add(arm.slug, result)
                self.results.append(result)
                bar.update()
        return [self._row(arm) for arm in self.arms]

    def _row(self, arm: Arm) -> Row:
        verdict, first = self.verdict(arm), self.compare.seeds[0]
        swept = {rate: score for (rate, seed), score in self.scores(arm).items() if seed == first}
        at_best = [r for r in self.results if r.arm == arm.name and r.rate == verdict.best]
        return Row(arm.name, verdict, swept, sorted(at_best, key=lambda r: r.seed))


def _shared(value: Any) -> Any:
    """Return the value of the first process on every one."""
    held = [value]
    broadcast_object_list(held)
    return held[0]


def environment() -> dict[str, Any]:
    """Say what the figures were measured on."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip() or None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def main() -> None:
    model_args, data_args, lora_args, config, args, compare = parse(extra=(CompareArguments,))
    require_comparable(compare, args)
    arms = parse_arms(compare.arms, config, lora_args)
    adapt_to_cpu(args)
    settings = {
        **asdict(model_args),
        **asdict(data_args),
        **asdict(lora_args),
        **config.to_dict(),
        **{name: getattr(args, name) for name in TRAINING},
        "eval_points": compare.eval_points,
    }
    folder = Path(args.output_dir)
    store = Store(folder, settings)

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
        about = {"environment": environment(), "settings": store.settings}
        write_whole(folder / "comparison.json", to_json(rows, comparison.metric, about))
        (folder / "comparison.md").write_text(table + "\n", encoding="utf-8")
        draw(rows, folder / "comparison.png")
        print(table)
        print(f"table, curves and figures are in {folder.resolve()}")


if __name__ == "__main__":
    main()
