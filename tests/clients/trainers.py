"""Trainers, losses and data that users write: what is special about each is in its class or its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler
from transformers import Trainer, TrainerCallback, default_data_collator

from clients.client import Client, adapted, arguments
from clients.models import GROUPED, TEXT, causal, from_config, masked


F = nn.functional


def llama() -> nn.Module:
    # Attention that can be differentiated twice, as a gradient penalty needs it.
    return from_config("CausalLM", "llama", GROUPED | {"attn_implementation": "eager"})


def bert(**sizes: Any) -> nn.Module:
    return from_config("SequenceClassification", "bert", TEXT | {"num_labels": 3} | sizes)


def with_llama(name: str, trainer: type[Trainer] = Trainer, rows: Callable[[], Any] = causal, **more: Any) -> Client:
    """A client with a tiny Llama; `of_client` names the fields of `Client` among `more`, the rest are arguments."""
    of_client = {key: more.pop(key) for key in ("config", "refused", "same_loss", "same_first_step") if key in more}
    passed = {key: more.pop(key) for key in ("data_collator", "callbacks", "optimizers") if key in more}

    def make(folder: Path) -> dict[str, Any]:
        args = arguments(folder, **more)
        whole = {key: value() if key in ("callbacks", "data_collator") else value for key, value in passed.items()}
        return {"model": adapted(llama()), "args": args, "train_dataset": rows(), **whole}

    return Client(name, make, trainer, **of_client)


# --- losses ----------------------------------------------------------------------------------------------------------


class OwnLoss(Trainer):
    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


class Penalised(Trainer):
    """Adds the squared length of the gradient of the loss by the embedded words."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        loss = model(inputs_embeds=embedded, labels=inputs["labels"]).loss
        (slope,) = torch.autograd.grad(loss, embedded, create_graph=True)
        return loss + 0.5 * slope.pow(2).sum()


class Regularised(Trainer):
    """Keeps what is trained small, as O-LoRA and its kin do."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, **kwargs)
        return loss + 1e-3 * torch.stack([p.pow(2).sum() for p in model.parameters() if p.requires_grad]).sum()


class Reporting(Trainer):
    """Logs from its loss, and keeps a meter."""

    seen = 0

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, **kwargs)
        self.seen += 1
        self.log({"seen": float(self.seen)})
        return loss


class Distilled(Trainer):
    """Learns from the same model without its adapter, too."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        with torch.no_grad(), model.disable_adapter():
            teacher = model(**inputs).logits
        return outputs.loss + F.mse_loss(outputs.logits, teacher)


class ByKeyword(nn.Module):
    """Calls its layers by the keyword of PEFT's, and the second under reentrant checkpointing of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.first(x=x).relu()
        hidden = torch.utils.checkpoint.checkpoint(lambda h: self.second(x=h).relu(), hidden, use_reentrant=True)
        logits = self.head(hidden)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Normed(nn.Module):
    """Batch norm, spectral norm and a counter: each changes in a forward pass in train mode."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.second = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.calls += 1
        logits = self.head(self.second(self.norm(self.first(x)).relu())) / (1 + 0.1 * self.calls)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Attentive(nn.Module):
    """Torch's own attention: alone, and in an `nn.TransformerEncoderLayer`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(2, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.embed(x.unflatten(1, (3, 2)))
        hidden = self.encoder(hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0])
        logits = self.head(hidden.mean(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def points() -> list[dict[str, Tensor]]:
    inputs = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    return [{"x": x, "labels": torch.tensor(i % 3)} for i, x in enumerate(inputs)]


def own_model(name: str, kind: type[nn.Module], targets: list[str], **more: Any) -> Client:
    def make(folder: Path) -> dict[str, Any]:
        args = arguments(folder)
        return {"model": adapted(kind(), target_modules=targets), "args": args, "train_dataset": points()}

    return Client(name, make, **more)


class Unfreezes(TrainerCallback):
    """Freezes the factors of the first layer and lets them go after one step."""

    @staticmethod
    def _of_first_layer(model: nn.Module) -> Iterator[nn.Parameter]:
        return (p for name, p in model.named_parameters() if "layers.0" in name and "lora_" in name)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        for parameter in self._of_first_layer(model):
            parameter.requires_grad_(True)


class Averages(TrainerCallback):
    """A moving average that begins with a copy of what is trained."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.mean = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        for name, parameter in model.named_parameters():
            if name in self.mean:
                self.mean[name].lerp_(parameter.detach(), 0.1)


LOSSES = [
    with_llama("compute_loss of one's own", OwnLoss),
    with_llama("Gradient penalty (`autograd.grad` in the loss)", Penalised),
    with_llama("Regulariser over what requires grad", Regularised, same_loss=False, same_first_step=False),
    with_llama("Loss that logs and counts", Reporting),
    with_llama("Distillation from the adapter switched off", Distilled),
    with_llama("Label smoothing", label_smoothing_factor=0.1),
    with_llama("Gradient accumulation", gradient_accumulation_steps=2, same_loss=False),  # logs the mean of two
    with_llama("Gradient checkpointing", gradient_checkpointing=True),
    with_llama("NEFTune noise", neftune_noise_alpha=5.0, same_loss=False),
    with_llama("Moving average by a callback", callbacks=lambda: [Averages()]),
    own_model("Layers called by keyword, checkpointing of one's own", ByKeyword, ["first", "second", "head"]),
    own_model(
        "`nn.MultiheadAttention` and `nn.TransformerEncoderLayer`",
        Attentive,
        ["embed", "attention", "self_attn", "linear1", "linear2"],
    ),
    own_model("Batch norm, spectral norm, a counter", Normed, ["first", "second", "head"], same_loss=False),
]


# --- data ------------------------------------------------------------------------------------------------------------


class Masks:
    """Masks words with a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = default_data_collator(rows)
        hidden = torch.rand(batch["input_ids"].shape, generator=self.generator) < 0.3
        return batch | {"input_ids": batch["input_ids"].masked_fill(hidden, 1)}


class Weighted(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        generator = torch.Generator().manual_seed(5)
        return WeightedRandomSampler([1.0 + i for i in range(12)], 12, generator=generator)


class OwnLoader(Trainer):
    """Hands out one loader that keeps its generator from call to call."""

    def get_train_dataloader(self) -> DataLoader:
        if "own_loader" not in vars(self):
            generator = torch.Generator().manual_seed(5)
            loader = DataLoader(
                self.train_dataset, 4, shuffle=True, generator=generator, collate_fn=self.data_collator
            )
            self.own_loader = self.accelerator.prepare(loader)
        return self.own_loader


class Jittered(Dataset):
    """Replaces a word of each row at random, with a generator of its own."""

    def __init__(self) -> None:
        self.rows, self.generator = causal(), torch.Generator().manual_seed(5)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {key: value.clone() for key, value in self.rows[index].items()}
        row["input_ids"][torch.randint(10, (), generator=self.generator)] = 1
        return row


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(causal())


def nested(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    batch = default_data_collator(rows)
    return {"text": {key: batch[key] for key in ("input_ids", "attention_mask")}, "labels": batch["labels"]}


class Unpacking(Trainer):
    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return model(**inputs["text"], labels=inputs["labels"]).loss


def words_first(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    return {"prompt": ["some words"] * len(rows), **default_data_collator(rows)}


class DropsWords(Trainer):
    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return model(**{key: value for key, value in inputs.items() if key != "prompt"}).loss


def ragged() -> list[dict[str, Tensor]]:
    """Rows of 4 to 10 words, sorted from short to long."""
    return [{key: value[: 4 + i // 2] for key, value in row.items()} for i, row in enumerate(causal())]


def pad(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    filling = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=value)
        for key, value in filling.items()
    }


def masked_bert(folder: Path) -> dict[str, Any]:
    model = adapted(from_config("MaskedLM", "bert", TEXT))
    return {"model": model, "args": arguments(folder), "train_dataset": masked(), "data_collator": Masks()}


DATA = [
    Client("Masked words by a collator with a generator of its own", masked_bert),
    with_llama("Weighted random sampler with a generator of its own", Weighted),
    with_llama("A loader that keeps its place from call to call", OwnLoader),
    with_llama("A data set with a generator of its own", rows=Jittered, same_loss=False),
    with_llama("A stream that starts over", rows=Stream),
    with_llama("Nested dictionaries in a batch", Unpacking, data_collator=lambda: nested),
    with_llama("A batch whose first entry is a list of words", DropsWords, data_collator=lambda: words_first),
    with_llama("Random order", train_sampling_strategy="random"),
    with_llama("Grouped by length", rows=ragged, data_collator=lambda: pad, train_sampling_strategy="group_by_length"),
    with_llama("Worker processes", dataloader_num_workers=1),
    with_llama("An uneven last batch", rows=lambda: causal()[:6]),
    with_llama("Batches of one row", per_device_train_batch_size=1, config={"num_samples": 1}),
]


CLIENTS = {"Losses and models of one's own": LOSSES, "Data": DATA}
