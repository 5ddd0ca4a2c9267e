"""One run of a comparison: an arm at one learning rate and seed, and everything that is reported of it."""

import gc
import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from finetuning.data import TaskData
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import PrinterCallback, Seq2SeqTrainingArguments, Trainer, TrainerCallback, set_seed

from comparison.arms import Arm
from comparison.environment import environment
from comparison.memory import PeakMemory
from comparison.starts import Samples
from lora_ga_trainer import anchored_parameter_names, newest_complete_checkpoint


# What the Trainer says about its own speed, which is measured here without evaluations.
_SPEED = ("_runtime", "_per_second")


@dataclass(frozen=True)
class Task:
    """
    What all runs share.

    Args:
        name: the recipe's name of the task.
        data: encoded rows.
        collate: makes a batch.
        args: the training arguments, without rate, seed and folder.
        load_model: loads a fresh base; a fresh head is drawn from the random numbers of the run's seed.
        make_trainer: a `LoRAGATrainer` for a model, arguments and a `LoRAGAConfig`.
        folder: of the comparison.
    """

    name: str
    data: TaskData
    collate: Callable[[list[Any]], dict[str, torch.Tensor]]
    args: Seq2SeqTrainingArguments
    load_model: Callable[[], nn.Module]
    make_trainer: Callable[..., Trainer]
    folder: Path


@dataclass
class Result:
    """
    What one run showed.

    Args:
        arm, rate, seed: of the run.
        evals: at each evaluation, in order: `step` and every `eval_...` metric.
        step_seconds: median over the optimizer steps, evaluation and start left out; `None` without a step.
        eval_seconds: median over the evaluations.
        start_seconds: for putting the arm on the model and everything before the first step.
        peak_bytes: most memory that the process held (CPU) or allocated (GPU) in the run; `None` where the system
            does not say.
        trained: numbers that learn.
        stored: numbers in the saved adapter, or in the model for full fine-tuning.
        environment: what it was measured on.
    """

    arm: str
    rate: float
    seed: int
    evals: list[dict[str, float]]
    step_seconds: float | None
    eval_seconds: float | None
    start_seconds: float
    peak_bytes: int | None
    trained: int
    stored: int
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Stopwatch(TrainerCallback):
    """Times the steps apart from what lies between them, and notes when the first one begins."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.begun = 0.0
        self.steps: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = time.perf_counter()
        self.first = self.first or self.begun

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.steps.append(time.perf_counter() - self.begun)


def run_arm(task: Task, arm: Arm, rate: float, seed: int, points: int, steps: int | None = None) -> Result:
    """
    Train one arm from a fresh base.

    A run that was cut off continues from its last complete checkpoint where `save_strategy` and the method leave any,
    and begins anew otherwise; the start is made again before the checkpoint is loaded, for arms that change the base.

    Args:
        task: what all runs share.
        arm, rate, seed: what is run.
        points: evaluations, evenly spread.
        steps: instead of `task.args.max_steps`, for a trial, which leaves nothing behind.
    """
    name = "trial" if steps is not None else f"rate{rate:g}_seed{seed}"  # the first run's own may hold checkpoints
    folder = task.folder / "runs" / arm.slug / name
    shared = task.args if arm.how.resumes else replace(task.args, save_strategy="no")
    args = _make_arguments(shared, folder, rate, seed, points, steps)
    peak, watch, begin = PeakMemory(), _Stopwatch(), time.perf_counter()
    trainer = build_trainer(task, arm, args)
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=newest_complete_checkpoint(trainer))
    evals = [log for log in trainer.state.log_history if "eval_loss" in log]
    trained, stored = count_numbers(trainer.accelerator.unwrap_model(trainer.model))
    result = Result(
        arm=arm.name,
        rate=rate,
        seed=seed,
        evals=[{name: value for name, value in log.items() if _is_reported(name)} for log in evals],
        step_seconds=statistics.median(watch.steps) if watch.steps else None,
        eval_seconds=statistics.median(log["eval_runtime"] for log in evals) if evals else None,
        start_seconds=(watch.first or time.perf_counter()) - begin,
        peak_bytes=peak.bytes(),
        trained=trained,
        stored=stored,
        environment=environment(),
    )
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        shutil.rmtree(folder, ignore_errors=True)  # the run's own: a finished run needs no checkpoint
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    return result


def build_trainer(task: Task, arm: Arm, args: Seq2SeqTrainingArguments) -> Trainer:
    """Load a fresh base, put `arm` on it and return its trainer, all with the random numbers of `args.seed`."""
    set_seed(args.seed)
    samples = Samples(task.data.train, task.collate, args, arm.config.num_samples)
    model = arm.how.make(task.load_model(), arm.lora, task.name, samples)
    trainer = task.make_trainer(model, args, replace(arm.config, probe_file=_name_probe_file(task, arm, args.seed)))
    if arm.how.after_start is not None:
        arm.how.after_start(trainer)
    trainer.remove_callback(PrinterCallback)  # one line a run is enough: the comparison's own
    return trainer


def _make_arguments(
    shared: Seq2SeqTrainingArguments, folder: Path, rate: float, seed: int, points: int, steps: int | None
) -> Seq2SeqTrainingArguments:
    """Return the arguments of one run; where checkpoints are wanted they are made at the evaluations."""
    every = max(1, (steps or shared.max_steps) // points)
    saves = shared.save_strategy != "no" and steps is None
    return replace(
        shared,
        output_dir=str(folder),
        learning_rate=rate,
        seed=seed,
        max_steps=steps or shared.max_steps,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps" if saves else "no",
        save_steps=every,
        save_total_limit=1,
        disable_tqdm=True,
    )


def _is_reported(name: str) -> bool:
    return name == "step" or (name.startswith("eval_") and not name.endswith(_SPEED))


def _name_probe_file(task: Task, arm: Arm, seed: int) -> str | None:
    """
    Name the probe that all rates of an arm, and all arms of an init that ask for the same one, share.

    The probe of a head that was warmed up is taken anew: a GPU does not train it twice to the same bits.
    """
    config = arm.config
    if config.init == "none" or config.head_warmup_steps > 0:
        return None
    # How large a sketch is by default, and whether it holds second moments, is a matter of the init and of whitening.
    asked = [seed, config.init, config.whitening > 0, config.num_samples, config.probe_order, config.probe_seed]
    asked += [config.estimator, config.sketch_size, config.min_energy_kept, asdict(arm.lora)]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
    folder = task.folder / "probes"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / f"seed{seed}_{digest}.safetensors")


def count_numbers(model: nn.Module) -> tuple[int, int]:
    """Return how many numbers learn and how many are stored; of an anchored adapter half of what is stored learns."""
    halved = anchored_parameter_names(model)
    trained = sum(
        parameter.numel() // (2 if name in halved else 1)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )
    if not isinstance(model, PeftModel):  # the whole model, or an adapter of our own, of which what learns is kept
        return trained, trained
    return trained, sum(tensor.numel() for tensor in get_peft_model_state_dict(model).values())
