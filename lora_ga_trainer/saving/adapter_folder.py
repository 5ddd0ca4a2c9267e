"""The files of a saved LoRA adapter, read layer by layer without a model."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftConfig, PeftType
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..adapters.host import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from ..engines.devices import to_fp64
from .json_file import is_number, read_json, short
from .record import plain_config


# What the factors are called behind the layer's name.
_LINEAR, _EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
# Starts of PEFT that subtract something from the base weight, so that `W + s B A` is not the adapted weight.
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class SavedFactors:
    """
    The factors of one layer as an adapter's folder holds them: its weight is changed by `s B A`.

    Args:
        name: of the layer inside the base model.
        names: of the two tensors behind the layer's name.
        stored_A: `(k, in)`, or `(k, in, *kernel)` of a convolution.
        stored_B: `(out, k)`, or `(out, k, 1, ...)`.
        s: PEFT's scaling.
    """

    name: str
    names: tuple[str, str]
    stored_A: Tensor
    stored_B: Tensor
    s: float

    @property
    def A(self) -> Tensor:  # (k, in)
        """In fp64."""
        return to_fp64(self.stored_A).flatten(1)

    @property
    def B(self) -> Tensor:  # (out, k)
        """In fp64."""
        return to_fp64(self.stored_B).flatten(1)

    @property
    def rank(self) -> int:
        """The stored rank k."""
        return self.stored_A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the weight; the axes of a kernel are part of `in`."""
        return self.stored_B.shape[0], math.prod(self.stored_A.shape[1:])

    @property
    def is_embedding(self) -> bool:
        return self.names == _EMBEDDING

    def as_stored(self, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        """Return factors `(m, in)` and `(out, m)` of another rank by the names and in the shapes of the files."""
        name_A, name_B = (f"{PREFIX}{self.name}.{name}" for name in self.names)
        A = A.reshape(A.shape[0], *self.stored_A.shape[1:])
        B = B.reshape(*B.shape, *self.stored_B.shape[2:])
        return {name_A: A, name_B: B}


class AdapterFolder:
    """
    A folder with `adapter_config.json` and `adapter_model.safetensors`, of which one layer at a time is read.

    Args:
        folder: as PEFT or a Trainer has written it.
        what: what is to be done with it, for messages: `"analyse_adapter"`.

    Attributes:
        path (`Path`): of the folder.
        config (`LoraConfig`): plain, without a record.
        layers (`list[str]`): names of the adapted layers inside the base model, sorted, with numbers by their size.

    Raises:
        `ValueError`: naming the folder and the setting, if there is no adapter in it, or one whose layers are not
            changed by `s B A`: DoRA and other variants, fused experts, starts that change the base.
    """

    def __init__(self, folder: str | os.PathLike[str], what: str) -> None:
        self.path, self._what = Path(folder), what
        self.config = self._read_config()
        self._require_plain()
        with self._open() as file:
            keys = list(file.keys())
        self._names: dict[str, tuple[str, str]] = {}
        for key in keys:
            for names in (_LINEAR, _EMBEDDING):
                if key.endswith(f".{names[0]}"):
                    self._names[key.removeprefix(PREFIX).removesuffix(f".{names[0]}")] = names
        self.layers = sorted(self._names, key=_natural)  # the file is sorted, with 10 before 2
        if not self.layers:
            raise ValueError(f"{what}: {self.path / WEIGHTS_FILE} holds no factors of LoRA ({len(keys)} tensors).")
        factors = {f"{PREFIX}{name}.{part}" for name, names in self._names.items() for part in names}
        self._others = [key for key in keys if key not in factors]

    @property
    def linear_layers(self) -> list[str]:
        """Those that are no embeddings."""
        return [name for name in self.layers if self._names[name] == _LINEAR]

    def read(self, name: str) -> SavedFactors:
        """
        Read the factors of a layer.

        Raises:
            `ValueError`: if a tensor is missing, or does not fit the config.
        """
        names = self._names[name]
        with self._open() as file:
            try:
                A, B = (file.get_tensor(f"{PREFIX}{name}.{part}") for part in names)
            except SafetensorError as error:
                raise ValueError(
                    f"{self.path}: {name}: {error}. Restore the file from the run that wrote it."
                ) from error
        rank, s = self._rank_and_scaling(name)
        found = f"{names[0]} {tuple(A.shape)} and {names[1]} {tuple(B.shape)}"
        if A.dim() < 2 or B.dim() < 2 or A.shape[0] != rank or B.shape[1] != rank:
            raise ValueError(
                f"{self.path}: {name}: the file holds {found}, and adapter_config.json says rank {rank}. Restore the "
                "two files of one save."
            )
        if not A.is_floating_point() or not B.is_floating_point():
            raise ValueError(
                f"{self.path}: {name}: factors of dtype {A.dtype} can't be read. Save them in fp32 or bf16."
            )
        if not A.isfinite().all() or not B.isfinite().all():
            raise ValueError(f"{self.path}: {name}: a factor is not finite. Take an earlier checkpoint.")
        return SavedFactors(name, names, A, B, s)

    def others(self) -> dict[str, Tensor]:
        """Read the tensors that are no factors: trained heads, biases, and what else PEFT has saved beside them."""
        with self._open() as file:
            return {name: file.get_tensor(name) for name in self._others}

    def scaling_of(self, key: str) -> float:
        """Return the scaling of the layer that a tensor of the file belongs to."""
        return self._rank_and_scaling(key.removeprefix(PREFIX).rpartition(".lora_B.")[0])[1]

    def _rank_and_scaling(self, name: str) -> tuple[int, float]:
        config = self.config  # as PEFT reads it in `LoraModel._create_and_replace`
        ranks, alphas = cast(dict[str, int], config.rank_pattern), cast(dict[str, float], config.alpha_pattern)
        rank = ranks.get(get_pattern_key(list(ranks), name), config.r)
        alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
        if type(rank) is not int or rank < 1 or not is_number(alpha):
            raise ValueError(
                f"{self.path / CONFIG_FILE}: {name} has rank {short(rank)} and alpha {short(alpha)}. Restore the file."
            )
        return rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)

    def _read_config(self) -> LoraConfig:
        way_out = "Point to a folder that PEFT or a Trainer has saved."
        content = read_json(self.path / CONFIG_FILE, "the config of an adapter", way_out)
        if not isinstance(content, dict) or content.get("peft_type") != PeftType.LORA.value:
            found = short(content.get("peft_type")) if isinstance(content, dict) else short(content)
            raise ValueError(f"{self._what}: {self.path} holds an adapter of type {found}, not LORA. {way_out}")
        try:
            return plain_config(cast(LoraConfig, PeftConfig.from_pretrained(os.fspath(self.path))))
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{self.path / CONFIG_FILE} is not a config of LoRA: {error}. {way_out}") from error

    def _require_plain(self) -> None:
        config = self.config
        start = str(config.init_lora_weights).lower()
        variants = [item.name for item in dataclasses.fields(config) if item.metadata.get("is_lora_variant")]
        variants += ["use_qalora", "layer_replication", "target_parameters"]
        odd: dict[str, Any] = {name: getattr(config, name) for name in variants}
        reasons = [f"{name}={short(value)}" for name, value in odd.items() if value]
        if start.startswith(_CHANGE_THE_BASE):
            reasons.append(f"init_lora_weights={config.init_lora_weights!r}")
        if reasons:
            raise ValueError(
                f"{self._what}: the adapter in {self.path} has {reasons[0]}, so that its layers are not linear ones "
                "whose weight `W` becomes `W + s B A`. DoRA and other variants, fused experts and starts that change "
                "the base are left out. Merge it with `merge_and_unload()`, or train a plain adapter."
            )

    @contextmanager
    def _open(self) -> Iterator[Any]:
        path = self.path / WEIGHTS_FILE
        try:
            file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path} can't be read ({error}). Save the adapter as safetensors, the default of PEFT."
            ) from error
        with file as opened:
            yield opened


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Return what to sort names of layers by: layer 2 comes before layer 10."""
    return [(word.isdecimal(), int(word) if word.isdecimal() else 0, word) for word in re.split(r"(\d+)", name)]


def exact_key(name: str) -> str:
    """Return the key of `rank_pattern` and `alpha_pattern` that matches the layer of this full name alone."""
    return f"^{re.escape(name)}"


def write_adapter(folder: str | os.PathLike[str], config: LoraConfig, tensors: dict[str, Tensor]) -> None:
    """
    Write an adapter that plain PEFT loads.

    Args:
        folder: made if it does not exist.
        config: written as `adapter_config.json`.
        tensors: by the names of PEFT's files.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, Path(folder) / WEIGHTS_FILE, metadata={"format": "pt"})
    config.save_pretrained(os.fspath(folder))
