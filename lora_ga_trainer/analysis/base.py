"""The weights under an adapter, one layer at a time: from a folder of safetensors, or from a model in memory."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..adapters.dense import read_dense
from ..adapters.host import find_host
from ..engines.parameters import plain_name
from ..saving.adapter_folder import SavedFactors
from ..saving.json_file import read_json


_INDEX = "model.safetensors.index.json"
_DTYPES = {"F64", "F32", "F16", "BF16"}
_IN_MEMORY = "Pass the model itself, loaded as it was for training, in place of the folder."


class BaseWeights(ABC):
    """Gives the frozen weight of one layer after the other and keeps none."""

    @abstractmethod
    def weight(self, layer: SavedFactors) -> Tensor:  # (out, in)
        """
        Return the weight under the factors of a layer, in the orientation of `G`; never to be written to.

        Raises:
            `ValueError`: naming the layer, if there is no such weight, or if it can't be read.
        """


def open_base(base: nn.Module | str | os.PathLike[str], fan_in_fan_out: bool) -> BaseWeights:
    """
    Open the base of an adapter.

    Args:
        base: a model, with an adapter in it or not; or a folder of safetensors, sharded or not.
        fan_in_fan_out: of the adapter's config: whether square weights of the files are stored as `(in, out)`.
    """
    return ModelBase(base) if isinstance(base, nn.Module) else FolderBase(Path(base), fan_in_fan_out)


class ModelBase(BaseWeights):
    """A model in memory. Quantised weights are dequantised, sharded ones gathered, one at a time."""

    def __init__(self, model: nn.Module) -> None:
        host = find_host(model)
        root = model if host is None else host.base
        self._kind = type(root).__name__
        self._modules = {plain_name(name): module for name, module in root.named_modules()}

    def weight(self, layer: SavedFactors) -> Tensor:
        module = self._modules.get(layer.name)
        if isinstance(module, BaseTunerLayer):
            if module.merged:
                raise ValueError(
                    f"Layer {layer.name}: an adapter is merged into the base weight. Call `model.unmerge_adapter()`."
                )
            adapted = not isinstance(module, (MultiheadAttention, ParamWrapper))
            module = module.get_base_layer() if adapted else None
        kinds = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
        if not isinstance(module, kinds):
            raise ValueError(
                f"Layer {layer.name}: the {self._kind} has {'no such layer' if module is None else type(module)} "
                "that is linear, a convolution or an embedding. Pass the base model that the adapter was trained on; "
                "adapters of nn.MultiheadAttention and of bare parameters can't be analysed."
            )
        if getattr(module, "groups", 1) != 1:
            raise ValueError(f"Layer {layer.name}: PEFT's adapter of a convolution with groups is no change `B A`.")
        shape = _shape_of(module)
        if shape != layer.shape:
            raise ValueError(
                f"Layer {layer.name}: the {self._kind} has a weight of {shape}, and the adapter is for {layer.shape}. "
                "Pass the base that the adapter was trained on."
            )
        return read_dense(layer.name, module, layer.shape)


def _shape_of(module: Any) -> tuple[int, int]:
    """Return `(out, in)` as a layer tells it; a quantised or sharded weight may have another shape."""
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.out_channels, module.in_channels * math.prod(module.kernel_size)


class FolderBase(BaseWeights):
    """A folder of safetensors. Of its files nothing is held but their names and one weight at a time."""

    def __init__(self, folder: Path, fan_in_fan_out: bool) -> None:
        self._folder, self._fan_in_fan_out = folder, fan_in_fan_out
        self._files = self._list_tensors()  # file by the name of the tensor
        self._square = self._against_config = ""  # a layer of each kind, once one was met

    def _list_tensors(self) -> dict[str, Path]:
        index = self._folder / _INDEX
        if index.is_file():
            content = read_json(index, "an index of safetensors", "Download the base again.")
            names = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
                raise ValueError(f"{index} has no weight_map. Download the base again.")
            return {name: self._folder / Path(file).name for name, file in names.items()}
        files = sorted(self._folder.glob("model*.safetensors")) or sorted(self._folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"base={str(self._folder)!r}: there is no file of safetensors in it. {_IN_MEMORY}")
        found = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                found.update(dict.fromkeys(file.keys(), path))
        return found

    def weight(self, layer: SavedFactors) -> Tensor:
        name = self._find(layer.name)
        try:
            with safe_open(self._files[name], framework="pt") as file:
                header = file.get_slice(name)
                shape, dtype = tuple(header.get_shape()), header.get_dtype()
                if dtype not in _DTYPES:
                    raise ValueError(f"Layer {layer.name}: {name} is stored as {dtype}: it is quantised. {_IN_MEMORY}")
                transposed = self._is_transposed(layer, shape)
                weight = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{self._files[name]}: {name} can't be read ({error}). Download the base again."
            ) from error
        return weight.T if transposed else weight.flatten(1)

    def _find(self, layer: str) -> str:
        """Name the tensor of a layer. Files of a model without its head begin deeper in the model."""
        name = f"{layer}.weight"
        if name in self._files:
            return name
        found = [key for key in self._files if key.endswith(f".{name}") or name.endswith(f".{key}")]
        if len(found) != 1:
            raise ValueError(
                f"Layer {layer}: {len(found)} tensors of {self._folder} can be its weight{_list(found)}; it may be "
                f"tied to another one, fused with others, or renamed when it is loaded. {_IN_MEMORY}"
            )
        return found[0]

    def _is_transposed(self, layer: SavedFactors, shape: Sequence[int]) -> bool:
        """Tell whether a weight is stored as `(in, out)`: all embeddings, and Conv1D layers, as of GPT-2."""
        out_features, in_features = layer.shape
        flat = (shape[0], math.prod(shape[1:])) if shape else (0, 0)
        turned = flat == (in_features, out_features) and len(shape) == 2
        if (layer.is_embedding or flat != layer.shape) and not turned:
            raise ValueError(
                f"Layer {layer.name}: {self._folder} holds its weight as {tuple(shape)}, and the adapter is for "
                f"{layer.shape}. Name the base that the adapter was trained on."
            )
        if layer.is_embedding or len(shape) > 2:
            return layer.is_embedding
        if out_features == in_features:
            self._square = layer.name
        elif turned != self._fan_in_fan_out:
            self._against_config = layer.name
        if self._square and self._against_config:
            raise ValueError(
                f"Layer {self._square}: adapter_config.json has fan_in_fan_out={self._fan_in_fan_out}, which layer "
                f"{self._against_config} contradicts, so that nobody can tell which way round a square weight is "
                f"stored. {_IN_MEMORY}"
            )
        return self._fan_in_fan_out if out_features == in_features else turned


def _list(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:3])})" if names else ""
