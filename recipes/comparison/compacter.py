"""Compacter (Mahabadi et al., arXiv 2106.04647): bottleneck adapters whose weights are sums of Kronecker products."""

import re

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.functional import gelu

from comparison.replacing import freeze_all_but_heads, replace_layers
from comparison.starts import Samples


# The last layer of an attention or a feed-forward part, before its output is added to the residual stream.
_LAST = re.compile(r"(^|\.)(output\.dense|o_proj|down_proj|out_proj|out_lin|lin2|c_proj|fc2|wo|o)$")
PARTS = 4  # n of the paper, its value for T5-base


class HypercomplexLinear(nn.Module):
    """
    `y = W x + b` with `W = sum_i rule_i (x) (s_i t_i)`, a sum of Kronecker products (the paper's equations 4 and 5).

    Args:
        in_features, out_features: multiples of n.
        rules: `(n, n, n)`, shared by all adapters of the model, which owns them.

    `s` is `(n, out / n, 1)` and `t` is `(n, 1, in / n)`: the second factor of each product has rank 1.
    """

    def __init__(self, in_features: int, out_features: int, rules: nn.Parameter) -> None:
        super().__init__()
        n, where = len(rules), {"device": rules.device}
        # In a tuple, so that the rules are not a parameter of this layer as well: the model owns them, and its
        # `save_pretrained` refuses a tensor that several names share.
        self._shared = (rules,)
        self.s = nn.Parameter(torch.randn(n, out_features // n, 1, **where))
        # With rules of variance 1/n, entries of W have variance 1 / in.
        self.t = nn.Parameter(torch.randn(n, 1, in_features // n, **where) / in_features**0.5)
        self.bias = nn.Parameter(torch.zeros(out_features, **where))

    @property
    def rules(self) -> nn.Parameter:
        return self._shared[0]

    @property
    def weight(self) -> Tensor:  # (out, in)
        n, rows, columns = len(self.rules), self.s.shape[1], self.t.shape[2]
        return torch.einsum("iab,ic,id->acbd", self.rules, self.s[..., 0], self.t[:, 0]).reshape(n * rows, n * columns)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class WithCompacter(nn.Module):
    """A frozen layer whose output `y` becomes `y + up(gelu(down(y)))`. `up` starts at 0."""

    def __init__(self, base_layer: nn.Module, width: int, bottleneck: int, rules: nn.Parameter) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.compacter_down = HypercomplexLinear(width, bottleneck, rules)
        self.compacter_up = HypercomplexLinear(bottleneck, width, rules)
        nn.init.zeros_(self.compacter_up.s)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        h = y.to(self.compacter_down.bias.dtype)
        return y + self.compacter_up(gelu(self.compacter_down(h))).to(y.dtype)


def add_compacter(model: nn.Module, config: LoraConfig, samples: Samples) -> nn.Module:
    """
    Put an adapter behind each attention and each feed-forward part.

    The bottleneck has 3 r units, rounded up to a multiple of 4: 24 at r = 8. The sizes of the first numbers are ours:
    the authors' could not be checked.
    """
    freeze_all_but_heads(model, config)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and _LAST.search(name)]
    names = [name for name in names if model.get_submodule(name).out_features % PARTS == 0]
    if not names:
        raise ValueError(
            f"arm 'compacter': {type(model).__name__} has no layer by a name that ends an attention or feed-forward "
            "part (o_proj, down_proj, output.dense, ...) with a multiple of 4 outputs. Leave it out."
        )
    device = model.get_submodule(names[0]).weight.device
    rules = nn.Parameter(torch.randn(PARTS, PARTS, PARTS, device=device) / PARTS**0.5)
    bottleneck = -(-3 * config.r // PARTS) * PARTS
    replace_layers(model, names, lambda name, layer: WithCompacter(layer, layer.out_features, bottleneck, rules))
    model.compacter_rules = rules
    return model
