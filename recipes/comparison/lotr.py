"""LoTR (Bershatsky et al., arXiv 2402.01376): the changes of like layers as one tensor of low rank."""

import re

import torch
from peft import LoraConfig
from torch import Tensor, nn

from comparison.replacing import freeze_all_but_heads, replace_layers
from comparison.starts import Samples


class LoTRLinear(nn.Module):
    """
    A frozen layer plus `scale * left core right`.

    Args:
        base_layer: frozen, from in to out features.
        left: `(out, r)`, shared by all layers of a kind and owned by the model.
        right: `(r, in)`, likewise.
        scale: alpha over r.

    The core `(r, r)` is the layer's own. It starts at 0, so the function is that of the base.
    """

    def __init__(self, base_layer: nn.Module, left: nn.Parameter, right: nn.Parameter, scale: float) -> None:
        super().__init__()
        self.base_layer, self.scale = base_layer, scale
        # In a tuple, so that the factors are not parameters of this layer as well: the model owns them, and its
        # `save_pretrained` refuses a tensor that several names share.
        self._shared = left, right
        r = left.shape[1]
        self.lotr_core = nn.Parameter(torch.zeros(r, r, device=left.device))

    @property
    def lotr_left(self) -> nn.Parameter:
        return self._shared[0]

    @property
    def lotr_right(self) -> nn.Parameter:
        return self._shared[1]

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        change = x.to(self.lotr_core.dtype) @ self.lotr_right.T @ self.lotr_core.T @ self.lotr_left.T
        return y + (self.scale * change).to(y.dtype)


def add_lotr(model: nn.Module, config: LoraConfig, samples: Samples) -> nn.Module:
    """
    Give like layers of all blocks, such as every query, shared outer factors.

    The outer factors are drawn from the standard normal distribution, as in the authors' code (github: daskol/lotr).
    Numbers that learn: `r (in + out)` for each kind of layer, and `r^2` for each layer.
    """
    names = freeze_all_but_heads(model, config)
    shared: dict[tuple[str, int, int], tuple[nn.Parameter, nn.Parameter]] = {}

    def make(name: str, layer: nn.Linear) -> LoTRLinear:
        kind = (re.sub(r"\d+", "*", name), layer.out_features, layer.in_features)
        if kind not in shared:
            left, right = torch.randn(layer.out_features, config.r), torch.randn(config.r, layer.in_features)
            device = layer.weight.device
            shared[kind] = nn.Parameter(left.to(device)), nn.Parameter(right.to(device))
        return LoTRLinear(layer, *shared[kind], config.lora_alpha / config.r)

    replace_layers(model, names, make)
    model.lotr_factors = nn.ParameterList(factor for pair in shared.values() for factor in pair)
    return model
