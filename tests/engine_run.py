"""
Train tiny Llama on one engine and write down what came of it; run by `tests/test_engines.py` in two processes.

    torchrun --nproc_per_node 2 tests/engine_run.py ENGINE PART FOLDER

`FOLDER/base` holds the model. Each process writes `FOLDER/ENGINE/PART-RANK.pt`. In the test's own process
`main_part("single", ...)` computes the same on one process with batches of the same samples.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock


sys.path.insert(0, str(Path(__file__).parent))

import tiny
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from processes import end_processes
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, default_data_collator

from lora_ga_trainer import (
    RULES,
    AdapterAnalysisCallback,
    LoRAGACallback,
    LoRAGAConfig,
    LoRAGATrainer,
    LoRAProAdamW,
    LoRAProOptimizer,
    plan_ranks,
)
from lora_ga_trainer.adapters.anchor import start_values
from lora_ga_trainer.adapters.find import find_adapted_layers, find_lora_layers
from lora_ga_trainer.adapters.layer import AdaptedLayer
from lora_ga_trainer.engines.parameters import is_sharded, read_parameter, write_parameters, write_whole
from lora_ga_trainer.maths.inits import INITS, Init, LayerGradient
from lora_ga_trainer.saving.record import record_of_model
from lora_ga_trainer.starts.prepare import prepare_adapter


STEPS, SAVED, KILLED = 10, 5, 7
ROWS = 11  # no multiple of the 4 samples of a step: the last batch does not divide
SKETCH = {"sketch_size": 8, "estimator": "sketch", "min_energy_kept": None}
B_ALONE = {"estimator": "exact", "train_A": False}
# Of each run: the config, and who starts the adapter.
RESUMED = {
    "lora_pro": ({"estimator": "exact", "correction": "lora_pro"}, "trainer"),
    "B alone": (B_ALONE, "trainer"),
    "B alone, model_init": (B_ALONE, "model_init"),
    "B alone, callback": ({"init": "none", "train_A": False}, "callback"),
}
SAVES = {"save_strategy": "steps", "save_steps": SAVED, "dropout": 0.1}


def zero(stage: int) -> dict[str, Any]:
    # Without a threshold of 0 ZeRO-3 would leave weights as small as these whole.
    return {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }


ENGINES: dict[str, dict[str, Any]] = {
    "single": {},
    "ddp": {},
    "fsdp2": {"save_only_model": True},
    "zero2": {"deepspeed": zero(2)},
    "zero3": {"deepspeed": zero(3)},
}


def make_trainer(engine: str, folder: Path, name: str, lora_ga: dict[str, Any], **changes: Any) -> Any:
    """
    Return a LoRAGATrainer, or with `way="callback"` a plain one with a callback.

    `changes` go to the training arguments, but for `targets`, `dropout`, `rows`, `callbacks` and `way`.
    """
    targets = changes.pop("targets", "all-linear")
    dropout, rows = changes.pop("dropout", 0.0), changes.pop("rows", None) or tiny.causal_rows(ROWS)
    callbacks, way = changes.pop("callbacks", None), changes.pop("way", "trainer")
    per_device = 4 if engine == "single" else 2
    settings = {"max_steps": STEPS, "per_device_train_batch_size": per_device, "lr_scheduler_type": "constant"}
    # Before the model: where DeepSpeed's stage is 3, `from_pretrained` then loads it in parts.
    args = tiny.arguments(folder / engine / name, **(settings | ENGINES[engine] | changes))
    where = {}
    if engine == "fsdp2":
        from transformers.distributed import DistributedConfig

        where["distributed_config"] = DistributedConfig(fsdp_size=2)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=targets, lora_dropout=dropout)
    config = LoRAGAConfig(**({"num_samples": 10} | lora_ga))
    load = lambda: LlamaForCausalLM.from_pretrained(folder / "base", **where)
    model = None if way == "model_init" else load()
    torch.manual_seed(11)
    if way == "callback":
        trainer = Trainer(get_peft_model(model, lora), args, train_dataset=rows, callbacks=callbacks)
        trainer.add_callback(LoRAGACallback(trainer, config))
        return trainer
    return LoRAGATrainer(
        model,
        args,
        train_dataset=rows,
        model_init=load if way == "model_init" else None,
        peft_config=lora,
        lora_ga_config=config,
        callbacks=callbacks,
    )


def adapter_of(trainer: LoRAGATrainer) -> dict[str, torch.Tensor]:
    return {
        name: read_parameter(parameter).clone()
        for name, parameter in trainer.model.named_parameters()
        if "lora_" in name
    }


class Look(TrainerCallback):
    """Keeps the start, and how many numbers each all-reduce has carried until then."""

    def __init__(self) -> None:
        self.start: dict[str, torch.Tensor] = {}
        self.carried: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.start:
            self.start, self.reductions = adapter_of(self.trainer), list(self.carried)


class Kill(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def counted_reductions(carried: list[int]) -> Iterator[None]:
    """Note how many numbers each all-reduce of this process carries."""
    reduce = torch.distributed.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        carried.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    torch.distributed.all_reduce = counted
    try:
        yield
    finally:
        torch.distributed.all_reduce = reduce


def trained(engine: str, folder: Path, name: str, lora_ga: dict[str, Any], **changes: Any) -> dict[str, Any]:
    look = Look()
    trainer = make_trainer(engine, folder, name, lora_ga, callbacks=[look], **changes)
    look.trainer = trainer
    with counted_reductions(look.carried):
        trainer.train()
    report = trainer.lora_ga_report
    return {
        "processes": trainer.accelerator.num_processes,
        "engine": type(trainer.model_wrapped).__name__,
        "sharded": is_sharded(trainer.model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight),
        "start": look.start,
        "reductions": look.reductions,
        "end": adapter_of(trainer),
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "loss_before": report.loss_before,
        "loss_after": report.loss_after,
        "found rate": trainer.lora_ga_rate_report and trainer.lora_ga_rate_report.learning_rate,
        "rates": [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log],
        "bytes_sent": report.bytes_sent,
        "samples": report.samples,
        "items": report.items,
        "sketched": sum(layer.sketched for layer in report.layers),
        "supported": [layer.directions_supported for layer in report.layers],
        "base": record_of_model(trainer.accelerator.unwrap_model(trainer.model)).base,
    }


def main_part(engine: str, folder: Path) -> dict[str, Any]:
    rows = tiny.causal_rows(4 * STEPS)
    run = functools.partial(trained, engine, folder)
    found = {}
    exact = {"estimator": "exact"}
    kept = {**exact, "probe_file": str(folder / f"{engine}.safetensors")}
    found["exact"] = run("exact", kept, rows=rows, save_strategy="steps", save_steps=SAVED)
    # Not a multiple of the 4 samples of a round, so a process repeats one; the two halves of an accumulation differ.
    repeats = {
        "num_samples": ROWS,
        "probe_order": "train",
        **exact,
        "probe_file": str(folder / f"{engine}-repeats.safetensors"),
    }
    in_order = {"train_sampling_strategy": "sequential", "max_steps": 1}
    found["repeats"] = run("repeats", repeats, **in_order)
    found["sketch"] = run("sketch", {"num_samples": ROWS, **SKETCH}, gradient_accumulation_steps=2, max_steps=1)
    # The first probes, the second takes the same start from the file of the first.
    file = {**SKETCH, "probe_file": str(folder / f"{engine}-sketch.safetensors")}
    for name in ("probing", "without a probe"):
        found[name] = run(name, file, dropout=0.1, max_steps=3)
    for name, correction in (("rate", "none"), ("rate of lora_pro", "lora_pro")):
        found[name] = run(
            name, {**exact, "find_learning_rate": True, "correction": correction}, rows=rows, warmup_steps=1
        )
    found["lora_pro"] = run("lora_pro", {"correction": "lora_pro", **exact}, rows=rows)
    if not engine.startswith("zero"):
        adamw = {"correction": "lora_pro_adamw", **exact}
        found["lora_pro_adamw"] = run("lora_pro_adamw", adamw, rows=rows, weight_decay=0.1, learning_rate=1e-4)
        others = {"riemannian": {"riemannian_reg": 1e-2}}
        if hasattr(torch.optim, "Muon"):
            others["muon"] = {"correction": "muon"}
        for name, config in others.items():
            found[name] = run(name, {"init": "lora_one", **config, **exact}, rows=rows)
    return found


def killed_part(engine: str, folder: Path, run: str) -> dict[str, Any]:
    config, way = RESUMED[run]
    trainer = make_trainer(engine, folder, f"killed {run}", config, way=way, callbacks=[Kill()], **SAVES)
    trainer.train()
    raise AssertionError("unreachable")


def resumed_part(engine: str, folder: Path, run: str) -> dict[str, Any]:
    config, way = RESUMED[run]
    trainer = make_trainer(engine, folder, f"killed {run}", config, way=way, **SAVES)
    if way == "callback":
        # PEFT draws the same `A` for both runs. So it is spoilt here: a resume that does not read it would show.
        for layer in find_lora_layers(trainer.model):
            write_whole(layer.stored_A, torch.full(layer.stored_A.shape, torch.nan))
    trainer.train(resume_from_checkpoint=True)
    whole = make_trainer(engine, folder, f"whole {run}", config, way=way, **SAVES)
    whole.train()
    return {
        "probed again": getattr(trainer, "lora_ga_report", None) is not None,
        "resumed": adapter_of(trainer),
        "whole": adapter_of(whole),
    }


def refused(engine: str, folder: Path) -> dict[str, str]:
    """What is impossible on this engine, and the sentence that says so before training starts."""
    tries: dict[str, Callable[[], Any]] = {}
    make = functools.partial(make_trainer, engine, folder, "refused")
    if engine.startswith("zero"):
        tries["lora_pro_adamw"] = lambda: make({"correction": "lora_pro_adamw"})
        tries["ranks"] = lambda: make({"ranks": "auto"})
        tries["muon"] = lambda: make({"init": "none", "correction": "muon"})
        tries["riemannian"] = lambda: make({"init": "none", "riemannian_reg": 1e-2})
    if engine == "fsdp2":
        last = str(folder / engine / "exact" / f"checkpoint-{STEPS}")
        tries["resume"] = lambda: make({}).train(resume_from_checkpoint=last)
        tries["ranks"] = lambda: make({"ranks": "auto"})
        tries["full checkpoints"] = lambda: make({}, save_only_model=False, save_strategy="steps")
    messages = {}
    for name, attempt in tries.items():
        try:
            attempt()
            messages[name] = "was not refused"
        except ValueError as error:
            messages[name] = str(error)
    return messages


def factors_of(layers: list[AdaptedLayer]) -> dict[str, tuple[torch.Tensor, ...]]:
    read = lambda stored: read_parameter(stored).clone()
    return {layer.name: (read(layer.stored_A), read(layer.stored_B)) for layer in layers}


def bare_part(engine: str, folder: Path) -> dict[str, Any]:
    """Shard a PEFT model by hand, adapter included, write a start, and step: the Trainer has no part in it."""
    accelerator = Accelerator(cpu=True)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(folder / "base"),
        LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj", "down_proj"]),
    )
    prepare_adapter(model, LoRAGAConfig())
    if engine == "fully_shard":
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
    elif engine == "fsdp1":
        layers = {type(model.get_base_model().model.layers[0])}
        policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=layers)
        model = FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
    trainer = SimpleNamespace(accelerator=accelerator, model=model)
    adapted = find_adapted_layers(getattr(model, "module", model))
    generator = torch.Generator().manual_seed(3)
    for layer in adapted:
        out, inner = layer.shape
        B0, A0 = torch.randn(out, 2, generator=generator), torch.randn(2, inner, generator=generator)
        write_parameters(trainer, start_values(layer, 0.1 * B0, 0.1 * A0))
    whole = lambda: contextlib.nullcontext()
    if engine == "fsdp1":
        whole = lambda: FullyShardedDataParallel.summon_full_params(model)
    with whole():
        start = factors_of(adapted)
    if engine == "fsdp1":
        return {"start": start}
    rank, size = trainer.accelerator.process_index, trainer.accelerator.num_processes
    rows = tiny.causal_rows(12, ragged=False)
    found = {"start": start, "sharded": is_sharded(adapted[0].stored_A)}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers = {
        "wrapper": lambda: LoRAProOptimizer(torch.optim.SGD(parameters, lr=5.0), model),
        "adamw": lambda: LoRAProAdamW(parameters, model, lr=1e-3, weight_decay=0.1),
    }
    for name, make in optimizers.items():
        optimizer = make()
        for step in range(3):
            of_step = rows[4 * step : 4 * step + 4][rank * 4 // size : (rank + 1) * 4 // size]
            model(**default_data_collator(of_step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found[name] = factors_of(adapted)
        found[f"{name} state"] = sum(
            value.numel() for state in optimizer.state.values() for value in state.values() if value.dim() == 2
        )
    return found


def moments_part(engine: str, folder: Path) -> dict[str, Any]:
    """Start with an init that asks for second moments, which the probe file then holds."""
    seen = {}

    def factors(gradient: LayerGradient) -> tuple[torch.Tensor, torch.Tensor]:
        seen[gradient.moments.input_second_moments.data_ptr()] = gradient.moments
        top, r = gradient.top, gradient.r
        return top.U.new_zeros(top.U.shape[0], r), top.Vt[:r] * gradient.moments.input_second_moments.sqrt()

    needs = frozenset({"second_moments", "covariance_directions"})
    init = Init("of this test", 1.0, anchored=False, pairs=1, factors=factors, needs=needs)
    config = {"init": "weighted_rows", "num_samples": 8, "probe_file": str(folder / f"{engine}-moments.safetensors")}
    with mock.patch.dict(INITS, weighted_rows=init):  # one process runs it among other tests
        found = trained(engine, folder, "moments", config, rows=tiny.causal_rows(8), max_steps=1)
    return {"start": found["start"], "layers seen": len(seen), "processes": found["processes"]}


def directions_part(engine: str, folder: Path) -> dict[str, Any]:
    """Turn the rows of `A` along whitened directions: of sketches, and those that half of the samples support."""
    found = {}
    # Few words, so that what one half of the samples says the other half says, too.
    rows = [
        {**row, **{key: row[key] % 5 for key in ("input_ids", "labels")}} for row in tiny.causal_rows(16, ragged=False)
    ]
    for name, config in (
        ("sketch", {"num_samples": 16, "sketch_size": 8, "min_energy_kept": None}),
        ("halves", {"num_samples": 16, "estimator": "exact", "supported_only": True}),
    ):
        config |= {"init": "gradient_directions", "whitening": 0.25}
        found[name] = trained(engine, folder, f"directions-{name}", config, rows=rows, max_steps=1)
    return found


KINDS = {"kinds": ["patches", "attention", "head"], "convolutions": ["patches", "head"]}


class Picture(nn.Module):
    """Patches by a convolution, torch's own attention over them, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.head = nn.Conv2d(8, 64, 3, stride=2, padding=1), nn.Linear(64, 3)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        h = torch.tanh(self.patches(x)).flatten(2).mT
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return {"loss": nn.functional.cross_entropy(self.head(h.mean(1)), labels)}


def kinds_part(engine: str, folder: Path, part: str) -> dict[str, Any]:
    """Train a model of layers that are not Linear, with whole gradients and with sketches."""
    generator = torch.Generator().manual_seed(3)
    rows = [{"x": torch.randn(8, 6, 6, generator=generator), "labels": i % 3} for i in range(40)]
    found: dict[str, Any] = {}
    for estimator in ("exact", "sketch"):
        per_device = 4 if engine == "single" else 2
        # AdamW would turn rounding into whole steps where a gradient is next to zero.
        settings = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 5, "lr_scheduler_type": "constant"}
        settings |= {"per_device_train_batch_size": per_device}
        args = tiny.arguments(folder / engine / f"{part}-{estimator}", **(settings | ENGINES[engine]))
        torch.manual_seed(11)
        model = get_peft_model(Picture(), LoraConfig(r=2, lora_alpha=4, target_modules=KINDS[part]))
        kept = folder / f"{engine}-{part}-{estimator}.safetensors"
        config = LoRAGAConfig(
            num_samples=16, estimator=estimator, sketch_size=8, probe_file=str(kept), min_energy_kept=None
        )
        trainer = LoRAGATrainer(model, args, train_dataset=rows, lora_ga_config=config)
        trainer.train()
        layers = trainer.lora_ga_report.layers
        found[estimator] = {
            "processes": trainer.accelerator.num_processes,
            "end": adapter_of(trainer),
            "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
            "sketched": [layer.name for layer in layers if layer.sketched],
            "energy": [layer.energy_share_r for layer in layers],
            "base": {n: read_parameter(p) for n, p in model.named_parameters() if "lora_" not in n},
        }
    return found


def embedding_part(engine: str, folder: Path) -> dict[str, Any]:
    """Start and train an adapter that holds an embedding, too."""
    config = {"estimator": "exact", "probe_file": str(folder / f"{engine}-embedding.safetensors")}
    rows, targets = tiny.causal_rows(12), ["embed_tokens", "up_proj"]
    return trained(engine, folder, "embedding", config, rows=rows, targets=targets, max_steps=3, max_grad_norm=0.1)


def ranks_part(engine: str, folder: Path) -> dict[str, Any]:
    """Plan by every rule, then train with planned ranks."""
    rows, exact = tiny.causal_rows(24), {"estimator": "exact"}
    trainer = make_trainer(engine, folder, "plans", exact, rows=rows)
    plans = {rule: plan_ranks(trainer, rule=rule).ranks for rule in RULES}
    auto = {**exact, "ranks": "auto", "rank_rule": "energy", "rank_budget": 1500}
    trainer = make_trainer(engine, folder, "ranks", auto, rows=rows, max_steps=4)
    trainer.train()
    return {
        "processes": trainer.accelerator.num_processes,
        "plans": plans,
        "trained": trainer.lora_ga_rank_plan.ranks,
        "end": adapter_of(trainer),
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
    }


def second_look_part(engine: str, folder: Path) -> dict[str, Any]:
    """Look again at every sketched layer."""
    place = str(folder / f"{engine}-second.safetensors")
    config = {"estimator": "sketch", "sketch_size": 8, "min_energy_kept": 1.0, "probe_file": place}
    return trained(engine, folder, "second", config, rows=tiny.causal_rows(40), max_steps=1)


def frozen_part(engine: str, folder: Path) -> dict[str, Any]:
    """Train `B` alone."""

    class Keep(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not started:
                started.update(factors())

    started: dict[str, Any] = {}
    trainer = make_trainer(
        engine,
        folder,
        "frozen",
        {"train_A": False, "estimator": "exact"},
        callbacks=[Keep()],
        rows=tiny.causal_rows(4 * STEPS),
        weight_decay=0.1,
        save_strategy="steps",
        save_steps=STEPS,
    )
    factors = lambda: factors_of(find_adapted_layers(trainer.accelerator.unwrap_model(trainer.model)))
    trainer.train()
    return {
        "start": started,
        "end": factors(),
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
    }


class Alone(AdapterAnalysisCallback):
    """On the second process of two the folder can't be seen, as on a second machine with a disk of its own."""

    def on_save(self, args: Any, *more: Any, **kwargs: Any) -> None:
        if self.trainer.accelerator.process_index == 1:
            args = SimpleNamespace(output_dir="/nowhere")
        super().on_save(args, *more, **kwargs)


def analysed_part(engine: str, folder: Path) -> dict[str, Any]:
    """Analyse every checkpoint, and once more where only one process sees the folder."""
    config, saves = {"estimator": "exact"}, {"save_strategy": "steps", "save_steps": SAVED, "learning_rate": 0.02}
    trainer = make_trainer(engine, folder, "analysed", config, **saves)
    analysis = AdapterAnalysisCallback(trainer, k=4, eps=0.6)
    trainer.add_callback(analysis)
    trainer.train()
    trainer = make_trainer(engine, folder, "analysed alone", config, **saves)
    alone = Alone(trainer, k=4, eps=0.6)
    trainer.add_callback(alone)
    trainer.train()
    return {
        "reports": {step: report.to_dict() for step, report in analysis.reports.items()},
        "alone": list(alone.reports),
        "steps": trainer.state.global_step,
    }


PARTS = {
    "analysed": analysed_part,
    "frozen": frozen_part,
    "second": second_look_part,
    "ranks": ranks_part,
    "bare": bare_part,
    "main": main_part,
    "kinds": functools.partial(kinds_part, part="kinds"),
    "convolutions": functools.partial(kinds_part, part="convolutions"),
    "moments": moments_part,
    "directions": directions_part,
    "embedding": embedding_part,
} | {
    f"{name} {run}": functools.partial(part, run=run)
    for name, part in (("killed", killed_part), ("resumed", resumed_part))
    for run in RESUMED
}


if __name__ == "__main__":
    engine, part, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    assert os.environ.get("WORLD_SIZE") == "2", "an engine is tested on two processes"
    torch.set_num_threads(1)
    found = PARTS[part](engine, folder)
    (folder / engine).mkdir(exist_ok=True)
    torch.save(found, folder / engine / f"{part}-{os.environ['RANK']}.pt")
    if part == "main":
        torch.save(refused(engine, folder), folder / engine / f"refused-{os.environ['RANK']}.pt")
    end_processes()
