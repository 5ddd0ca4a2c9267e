"""The probe leaves no trace: state that data, collator, sampler, loader, model and trainer keep in themselves."""

from __future__ import annotations

import copy
import itertools
import queue
import random
import re
import time
from collections import Counter, defaultdict, deque
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch
from test_trainer import adapter_of, assert_bitwise
from torch import Tensor, nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    WeightedRandomSampler,
)
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, Trainer, TrainerCallback

from lora_ga_trainer import LoRAGACallback, LoRAGAConfig, LoRAGATrainer
from lora_ga_trainer.gradients.model_state import keep_model
from lora_ga_trainer.gradients.state import KeptState


STEPS = 4


class Recording(Trainer):
    """Remembers every batch that is trained on, as it comes out of the loader."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.setdefault("batches", []).append({key: value.clone() for key, value in inputs.items()})
        return super().training_step(model, inputs, *args, **kwargs)


class Undo(TrainerCallback):
    """Puts the adapter back to what it was before the start, so that the run is plain's to the bit."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self.before:
                    parameter.copy_(self.before[name])


def prepare(folder: Any, ours: bool, make: Any, mixed: type = Recording, callbacks: Any = (), **changes: Any) -> Any:
    """Make a plain trainer or one with a start that is undone. `make` returns fresh data and more arguments."""
    torch.manual_seed(11)
    given = {"model": None, "config": {}, **make()}
    model = given.pop("model") or tiny.with_lora(tiny.llama(), target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    config = LoRAGAConfig(**({"init": "lora_one", "num_samples": 8} | given.pop("config")))
    more = {"lora_ga_config": config} if ours else {}
    kind = type("Ours", (mixed, LoRAGATrainer), {}) if ours else mixed
    undo = Undo()
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 4} | given.pop("args", {}) | changes
    trainer = kind(model, tiny.arguments(folder, **settings), callbacks=[undo, *callbacks], **given, **more)
    undo.before = adapter_of(trainer)
    return trainer


def run(folder: Any, ours: bool, make: Any, mixed: type = Recording, **more: Any) -> Any:
    trainer = prepare(folder, ours, make, mixed, **more)
    trainer.train()
    if ours:
        assert trainer.lora_ga_report.samples >= 8
    return trainer


def logged(trainer: Trainer) -> list[dict[str, Any]]:
    clock = ("train_runtime", "per_second", "lora_ga/")
    history = trainer.state.log_history
    kept = [{k: v for k, v in log.items() if not any(word in k for word in clock)} for log in history]
    return [log for log in kept if set(log) - {"step", "epoch"}]


def assert_same_run(left: Trainer, right: Trainer) -> None:
    """The same batches, the same figures, the same weights, bit for bit."""
    assert len(left.batches) == len(right.batches) == left.state.global_step == right.state.global_step
    for a, b in zip(left.batches, right.batches, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert logged(left) == logged(right)
    assert_bitwise(adapter_of(left), adapter_of(right))


def masking_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(tiny.VOCABULARY - 3)}
    words |= {"[PAD]": len(words), "[MASK]": len(words) + 1, "[UNK]": len(words) + 2}
    model = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]")


def stack(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


def ids_only(count: int = 40) -> list[dict[str, Tensor]]:
    return [{"input_ids": row["input_ids"]} for row in tiny.causal_rows(count)]


def masked(seed: int | None) -> Any:
    return lambda: {
        "train_dataset": ids_only(),
        "data_collator": DataCollatorForLanguageModeling(masking_tokenizer(), seed=seed),
    }


class Noisy:
    """Replaces tokens by random ones, drawn from a generator of its own."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def draw(self, count: int) -> list[int]:
        generator = self.generator
        if isinstance(generator, random.Random):
            return [generator.randrange(tiny.VOCABULARY) for _ in range(count)]
        if isinstance(generator, torch.Generator):
            return torch.randint(0, tiny.VOCABULARY, (count,), generator=generator).tolist()
        numbers = getattr(generator, "integers", None) or generator.randint
        return numbers(0, tiny.VOCABULARY, count).tolist()

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = stack(rows)
        batch["input_ids"] = batch["input_ids"].clone()
        batch["input_ids"][:, 3] = torch.tensor(self.draw(len(rows)))
        return batch


def noisy(generator: Any) -> Any:
    return lambda: {"train_dataset": tiny.causal_rows(40), "data_collator": Noisy(generator())}


GLOBAL = random.Random()


def with_global(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return Noisy(GLOBAL)(rows)


def in_global() -> dict[str, Any]:
    GLOBAL.seed(5)
    return {"train_dataset": tiny.causal_rows(40), "data_collator": with_global}


def in_closure() -> dict[str, Any]:
    collate, calls = Noisy(np.random.default_rng(5)), 0

    def closed(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        batch = collate(rows)
        batch["input_ids"][:, 4] = calls
        return batch

    return {"train_dataset": tiny.causal_rows(40), "data_collator": closed}


def taking_labels(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Writes into the samples and takes entries out, so that a second visit sees others."""
    for row in rows:
        row["input_ids"] += 1
        row["input_ids"] %= tiny.VOCABULARY
    return {"labels": torch.stack([row.pop("labels", row["input_ids"]) for row in rows])} | stack(
        [{"input_ids": row["input_ids"].clone()} for row in rows]
    )


class Augmented(Dataset):
    """Draws from a generator of its own, counts its reads and remembers what was read."""

    def __init__(self) -> None:
        self.rows, self.rng, self.reads, self.order = tiny.causal_rows(40), random.Random(5), 0, deque(maxlen=7)
        self.seen, self.of_row, self.total = [], Counter(), torch.zeros(())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.reads += 1
        self.order.append(index)
        self.seen.append(index)
        self.of_row[index] += 1
        self.total += 1
        ids = self.rows[index]["input_ids"].clone()
        ids[2], ids[3], ids[4] = self.rng.randrange(tiny.VOCABULARY), self.reads % 90, sum(self.order) % 90
        ids[5], ids[6], ids[7] = len(self.seen), self.of_row[index], int(self.total)
        return self.rows[index] | {"input_ids": ids}


class Slotted:
    __slots__ = ("drawn", "rows")

    def __init__(self) -> None:
        self.rows, self.drawn = tiny.causal_rows(40), 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.drawn += 1
        return self.rows[(index + self.drawn) % 40]


class Sampling(Recording):
    """Has a sampler of its own, with a generator that the trainer keeps."""

    kind = "weighted"

    def _get_train_sampler(self, *args: Any) -> Any:
        if "generator" not in vars(self):
            self.generator = torch.Generator().manual_seed(5)
        if self.kind == "weighted":
            return WeightedRandomSampler(torch.arange(1.0, 41.0), 40, generator=self.generator)
        return RandomSampler(self.train_dataset, generator=self.generator)


class Uniform(Sampling):
    kind = "random"


class KeptLoader(Recording):
    """Hands out one and the same loader."""

    def get_train_dataloader(self) -> Any:
        if "loader" not in vars(self):
            self.loader = self.make_loader()
        return self.loader

    def make_loader(self) -> Any:
        rows = self.train_dataset
        return DataLoader(rows, 4, True, collate_fn=stack, generator=torch.Generator().manual_seed(5))


class Placed:
    """A loader that goes on where it stopped."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.place = rows, 0

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Any:
        while True:
            first = self.place
            self.place = (first + 4) % len(self.rows)
            yield stack(self.rows[first : first + 4])


class Consuming:
    """A loader that reads from an iterator which nobody can start over."""

    def __init__(self, rows: list[dict[str, Any]], kind: str) -> None:
        loader = DataLoader(rows, 4, shuffle=True, collate_fn=stack)
        self.batches = {
            "generator": lambda: (batch for batch in loader),
            "cycle": lambda: itertools.cycle([stack(rows[i : i + 4]) for i in range(0, 40, 4)]),
        }[kind]()

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Any:
        while (batch := next(self.batches, None)) is not None:
            yield batch


class KeptPlace(KeptLoader):
    def make_loader(self) -> Any:
        return Placed(self.train_dataset)


class KeptGenerator(KeptLoader):
    def make_loader(self) -> Any:
        return Consuming(self.train_dataset, "generator")


class KeptCycle(KeptLoader):
    def make_loader(self) -> Any:
        return Consuming(self.train_dataset, "cycle")


class KeptWorkers(KeptLoader):
    """Has workers that live on, which another pass was begun with."""

    def make_loader(self) -> Any:
        loader = DataLoader(self.train_dataset, 4, True, collate_fn=stack, num_workers=1, persistent_workers=True)
        next(iter(loader))
        return loader


class Place(IterableDataset):
    """A stream that goes on where it stopped."""

    def __init__(self) -> None:
        self.rows, self.place = tiny.causal_rows(40), 0

    def __iter__(self) -> Any:
        while True:
            self.place = (self.place + 1) % len(self.rows)
            yield self.rows[self.place]


class Read(IterableDataset):
    """A stream that reads lines from a file which stays open."""

    def __init__(self, path: Any) -> None:
        path.write_text("".join(f"{i}\n" for i in range(200)))
        self.rows, self.file = tiny.causal_rows(40), path.open()

    def __iter__(self) -> Any:
        for line in self.file:
            yield self.rows[int(line) % 40]


def transformed() -> dict[str, Any]:
    """A data set of Hugging Face, whose transform draws from a generator of its own."""
    rows = tiny.causal_rows(40)
    data = datasets.Dataset.from_dict({key: [row[key].tolist() for row in rows] for key in rows[0]})
    rng = random.Random(5)

    def transform(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        ids = [[rng.randrange(tiny.VOCABULARY), *row[1:]] for row in batch["input_ids"]]
        return {**batch, "input_ids": ids}

    return {"train_dataset": data.with_transform(transform), "args": {"remove_unused_columns": False}}


def rows_and(**more: Any) -> Any:
    return lambda: {"train_dataset": tiny.causal_rows(40), **more}


DATA: dict[str, tuple[Any, type]] = {
    "MLM collator": (masked(None), Recording),
    "MLM collator with a seed": (masked(7), Recording),
    "torch generator": (noisy(lambda: torch.Generator().manual_seed(5)), Recording),
    "Python generator": (noisy(lambda: random.Random(5)), Recording),
    "NumPy generator": (noisy(lambda: np.random.default_rng(5)), Recording),
    "NumPy state": (noisy(lambda: np.random.RandomState(5)), Recording),
    "global generator": (in_global, Recording),
    "closure": (in_closure, Recording),
    "collator that writes into samples": (rows_and(data_collator=taking_labels), Recording),
    "data set with a state": (lambda: {"train_dataset": Augmented()}, Recording),
    "data set with slots": (lambda: {"train_dataset": Slotted()}, Recording),
    "data set with a transform": (transformed, Recording),
    "two data sets": (lambda: {"train_dataset": ConcatDataset([Augmented(), Slotted()])}, Recording),
    "part of a data set": (lambda: {"train_dataset": Subset(Augmented(), list(range(30)))}, Recording),
    "weighted sampler": (rows_and(), Sampling),
    "random sampler": (rows_and(), Uniform),
    "loader kept": (rows_and(), KeptLoader),
    "loader with a place": (rows_and(), KeptPlace),
    "loader on a generator": (rows_and(), KeptGenerator),
    "loader on a cycle": (rows_and(), KeptCycle),
    "loader with workers": (rows_and(), KeptWorkers),
    "stream with a place": (lambda: {"train_dataset": Place()}, Recording),
    "length-grouped": (rows_and(args={"train_sampling_strategy": "group_by_length"}), Recording),
}


@pytest.mark.parametrize("case", DATA)
def test_every_batch_is_that_of_a_run_without_a_probe(case: str, tmp_path: Any, caplog: Any) -> None:
    make, mixed = DATA[case]
    with caplog.at_level("WARNING", logger="lora_ga_trainer"):
        ours = run(tmp_path / "ours", True, make, mixed)
    assert "can't give back" not in caplog.text
    assert_same_run(ours, run(tmp_path / "plain", False, make, mixed))


def test_the_fingerprint_of_a_probe_file_reads_the_data_without_a_trace(tmp_path: Any) -> None:
    make = lambda: {"train_dataset": Augmented(), "config": {"probe_file": str(tmp_path / "probe.safetensors")}}
    plain = run(tmp_path / "plain", False, make)
    for which in ("writes", "reads"):
        assert_same_run(run(tmp_path / which, True, make), plain)


def test_a_file_that_is_read_is_read_from_the_same_place(tmp_path: Any) -> None:
    make = lambda: {"train_dataset": Read(tmp_path / "lines")}
    ours, plain = run(tmp_path / "ours", True, make), run(tmp_path / "plain", False, make)
    assert_same_run(ours, plain)


class Queued(Dataset):
    """Takes what another thread has put into a queue."""

    def __init__(self) -> None:
        self.rows, self.queue = tiny.causal_rows(40), queue.Queue()
        for i in range(200):
            self.queue.put(i % 40)

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[self.queue.get()]


class BareGenerator(KeptLoader):
    """Training holds the generator itself, which can't give way to anything."""

    def make_loader(self) -> Any:
        return (stack(self.train_dataset[i : i + 4]) for i in range(0, 40, 4))


@pytest.mark.parametrize(
    ("make", "mixed", "name"),
    [
        (lambda: {"train_dataset": Queued()}, Recording, r"train_dataset\.queue \(a Queue hands over"),
        (rows_and(), BareGenerator, r"train_dataloader \(a generator can be read once\)"),
    ],
)
def test_what_cannot_be_given_back_is_named_once_before_it_happens(
    make: Any, mixed: type, name: str, tmp_path: Any, caplog: Any
) -> None:
    model = tiny.with_lora(tiny.llama(), target_modules=["q_proj"])
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(len(caplog.records)))
    with caplog.at_level("WARNING", logger="lora_ga_trainer"):
        run(tmp_path, True, lambda: {**make(), "model": model}, mixed)
    named = [record for record in caplog.records if "can't give back" in record.message]
    assert len(named) == 1
    assert re.search(name, named[0].message)
    assert calls[0] >= 1, "nothing may run before it is said"


class Stateful(nn.Module):
    """All that a forward pass in train mode may change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)
        self.norm = nn.BatchNorm1d(32)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))
        self.older = nn.utils.spectral_norm(nn.Linear(16, 16))
        self.head = nn.Linear(16, 3)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("hidden", torch.zeros(4), persistent=False)
        self.register_buffer("rebound", torch.zeros(4))
        self.register_buffer("bank", torch.zeros(600, 512))  # above 1 MiB
        self.calls, self.history, self.loose = 0, [], torch.zeros(3)
        self.averages, self.rng = defaultdict(float), random.Random(1)
        self.hooked = Counter()
        self.head.register_forward_hook(Hook())

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if not getattr(self, "has_late_hook", False):  # as transformers puts its hooks on in the first pass
            self.head.register_forward_hook(Hook())
            self.has_late_hook = True
        h = self.older(self.spectral(self.b(self.norm(self.a(x)).relu())))
        if self.training:
            self.steps += 1
            self.hidden.mul_(0.9).add_(1)
            self.rebound = self.rebound + h.detach().mean()
            self.bank[int(self.steps) % 600] = h.detach().mean()
            self.calls += 1
            self.history.append(self.rng.random())
            self.loose += 1
            self.averages["h"] += float(h.detach().mean())
            self.late = getattr(self, "late", 0) + 1
        loss = nn.functional.cross_entropy(self.head(h + self.bank.mean()), labels)
        return {"loss": loss * (1 + 0.01 * self.history[-1]) if self.history else loss}


class Hook:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.calls += 1
        return output * (1 + 0.01 * self.calls)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Buffers and plain attributes by name, whatever PEFT has wrapped around the model."""
    inner = next(module for module in model.modules() if isinstance(module, Stateful))
    found: dict[str, Any] = {name: value.clone() for name, value in inner.named_buffers()}
    for name in ("calls", "history", "averages", "late"):
        found[name] = copy.deepcopy(getattr(inner, name, "absent"))
    hooks = [hook for module in inner.modules() for hook in module._forward_hooks.values() if isinstance(hook, Hook)]
    return found | {"loose": inner.loose.clone(), "rng": inner.rng.getstate(), "hook": [hook.calls for hook in hooks]}


def class_vectors(count: int = 40) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(16, generator=generator), "labels": i % 3} for i in range(count)]


def test_what_a_forward_pass_changes_is_given_back(tmp_path: Any) -> None:
    class AtStart(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            self.__dict__.setdefault("seen", state_of(model))

    runs, first = {}, {}
    for ours in (True, False):
        seen = AtStart()

        model = tiny.with_lora(Stateful(), target_modules=["a", "b"])
        before = state_of(model)
        make = lambda model=model: {
            "model": model,
            "train_dataset": class_vectors(),
            "args": {"remove_unused_columns": False},
        }
        runs[ours] = run(tmp_path / str(ours), ours, make, callbacks=[seen])
        first[ours] = seen.seen
        for name, value in before.items():
            now = first[ours][name]
            assert torch.equal(now, value) if isinstance(value, Tensor) else now == value, name
        assert int(state_of(model)["steps"]) == STEPS
    assert_same_run(runs[True], runs[False])
    for name, value in state_of(runs[False].model).items():
        now = state_of(runs[True].model)[name]
        assert torch.equal(now, value) if isinstance(value, Tensor) else now == value, name


class Averaging(nn.Module):
    """Keeps a moving average of its head in a parameter that a forward pass writes, as momentum encoders do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(6, width), nn.Linear(width, 3)
        self.average = nn.Parameter(self.head.weight.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            self.average.lerp_(self.head.weight + 1, 0.1)
        hidden = self.first(x).relu()
        logits = self.head(hidden) + 0.1 * hidden @ self.average.T
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def averaging(width: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    rows = [{"x": torch.randn(6, generator=generator), "labels": torch.tensor(i % 3)} for i in range(16)]
    return {"model": tiny.with_lora(Averaging(width), target_modules=["first", "head"]), "train_dataset": rows}


def test_a_small_parameter_that_a_forward_pass_writes_is_given_back(tmp_path: Any, caplog: Any) -> None:
    plain, ours = (run(tmp_path / name, name == "b", lambda: averaging(8)) for name in ("a", "b"))
    assert_same_run(plain, ours)
    found, expected = (dict(trainer.model.named_parameters()) for trainer in (ours, plain))
    (name,) = (name for name in found if name.endswith("average"))
    assert torch.equal(found[name], expected[name])
    assert "too large" not in caplog.text


def test_what_is_too_large_to_copy_is_named_once_when_it_was_written(tmp_path: Any, caplog: Any) -> None:
    class Counts(Recording):
        """Writes into a large tensor and a large array, and leaves others alone."""

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.counted[5] += 1
            self.array[7] += 1
            return super().compute_loss(*args, **kwargs)

    trainer = prepare(tmp_path, True, lambda: averaging(100_000), Counts, max_steps=2)
    trainer.counted, trainer.still = torch.zeros(300_000), torch.zeros(300_000)
    trainer.array, trainer.unread = np.zeros(200_000), np.zeros(200_000)
    trainer.train()
    (said,) = (record.getMessage() for record in caplog.records if "too large" in record.getMessage())
    named = re.search(r"without it: (.*?)\. Use", said).group(1).split(", ")
    assert sorted(named) == ["model.base_model.model.average", "trainer.array", "trainer.counted"]


def test_codes_of_a_quantised_weight_are_not_copied() -> None:
    """Whole numbers of the size of a weight stay what they are; scales are small."""
    module = nn.Module()
    module.register_buffer("qweight", torch.zeros(512, 512, dtype=torch.int32))
    module.register_buffer("scales", torch.ones(512))
    kept, copied = KeptState(), []
    kept.keep_tensor = lambda value: copied.append(value)
    keep_model(kept, module, "model")
    assert [id(value) for value in copied] == [id(module.scales)]


class Meter:
    """What torchmetrics' meters look like: tensors, numbers and lists."""

    def __init__(self) -> None:
        self.total, self.count, self.values = torch.zeros(()), 0, []

    def update(self, value: float) -> None:
        self.total += value
        self.count += 1
        self.values.append(value)


class Writing(Recording):
    """Writes figures wherever a trainer may while it computes a loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.meter, self.counts, self.window = Meter(), {"calls": 0, "by": defaultdict(list)}, deque(maxlen=2)
        self.calls, self.best, self._private = 0, None, []
        self.ema = torch.zeros(())
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        value = loss.item()
        self.calls += 1
        self.meter.update(value)
        self.counts["calls"] += 1
        self.counts["by"][self.calls % 2].append(value)
        self.window.append(value)
        self.best = value if self.best is None else min(self.best, value)
        self._private.append(value)
        self.ema.mul_(0.9).add_(0.1 * value)
        self.fresh = getattr(self, "fresh", 0) + 1
        self.state.num_input_tokens_seen += 3
        self.log({"inner": value})
        return loss * (1 + 0.01 * self.calls)


def written(trainer: Trainer) -> dict[str, Any]:
    names = ("calls", "counts", "window", "best", "_private", "fresh")
    found = {name: getattr(trainer, name) for name in names}
    return found | {"ema": trainer.ema.item(), "meter": {**vars(trainer.meter), "total": trainer.meter.total.item()}}


def test_what_a_loss_writes_is_given_back_and_logs_stay_silent(tmp_path: Any) -> None:
    ours = run(tmp_path / "ours", True, rows_and(), Writing)
    plain = run(tmp_path / "plain", False, rows_and(), Writing)
    assert_same_run(ours, plain)
    assert sum("inner" in log for log in ours.state.log_history) == STEPS
    assert ours.calls == ours.meter.count == len(ours.meter.values) == STEPS
    assert written(ours) == written(plain)
    assert ours.state.num_input_tokens_seen == plain.state.num_input_tokens_seen == 3 * STEPS


@pytest.mark.parametrize("mixed", [Recording, Writing])
def test_the_callback_alone_leaves_no_trace(mixed: type, tmp_path: Any) -> None:
    make = masked(7)
    plain = run(tmp_path / "plain", False, make, mixed)
    ours = prepare(tmp_path / "ours", False, make, mixed)
    ours.add_callback(LoRAGACallback(ours, LoRAGAConfig(init="lora_one", num_samples=8)))
    ours.train()
    assert_same_run(ours, plain)


FAILING: list[bool] = []


def test_everything_is_given_back_after_an_error(tmp_path: Any) -> None:
    """A second try then starts as the first would have."""

    class Failing(Writing):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if self.calls == 2 and FAILING:
                FAILING.clear()
                raise RuntimeError("once")
            return loss

    make = masked(7)
    plain = run(tmp_path / "plain", False, make, Failing)
    FAILING[:] = [True]
    trainer = prepare(tmp_path / "ours", True, make, Failing)
    with pytest.raises(RuntimeError, match="once"):
        trainer.train()
    assert trainer.calls == 0
    trainer.train()
    assert_same_run(trainer, plain)
    assert written(trainer) == written(plain)


def test_data_is_neither_copied_nor_walked_through() -> None:
    """A million rows and a table of 400 MB take no longer than a few: what is in them is data."""

    class Big:
        def __init__(self) -> None:
            self.table = torch.empty(100_000_000)
            self.rows = [{"a": i} for i in range(200_000)]
            self.array = np.empty(10_000_000)
            self.images = [torch.zeros(200, 1000) for _ in range(900)]  # 720 MB, each below the limit of one
            self.place = 0

    big, kept = Big(), KeptState()
    start = time.perf_counter()
    kept.keep(big, "big")
    big.place = 3
    kept.give_back()
    assert time.perf_counter() - start < 2
    assert big.place == 0
    assert kept._left_bytes >= 0
    assert len(kept._seen) < 1000
    assert not kept.lost


def test_a_graph_without_end_is_named() -> None:
    kept = KeptState()
    rows = [[[i, [j]] for j in range(900)] for i in range(30)]
    kept.keep({"rows": rows}, "train_dataset")
    assert "20,000" in kept.lost["train_dataset"]
