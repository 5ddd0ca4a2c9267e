"""A start of directions alone: plain LoRA's rows of `A`, turned to where the gradient points. Pure maths."""

from __future__ import annotations

import torch
from torch import Tensor


# Standard errors from which on a direction of one half of the samples counts as supported by the other half. Of pure
# noise 2.3% pass.
SUPPORTED = 2.0


def turned_rows(
    S: Tensor,  # (k,)
    Vt: Tensor,  # (k, in)
    plain: Tensor,  # (r, in)
    supported: Tensor | None = None,  # (k,), bool
) -> Tensor:  # (r, in)
    """
    Turn the rows of a plain `A` along right singular vectors, strongest first. Every row keeps its length.

    Rows that no direction is left for stay as they are, to the bit: `r` is larger than the numerical rank of the
    gradient, or fewer directions are supported.

    Args:
        S, Vt: singular values and right singular vectors, descending.
        plain: the rows that PEFT has drawn.
        supported: which of the directions to use; default all.
    """
    r = min(len(plain), len(S))
    used = torch.gt(S[:r], torch.finfo(S.dtype).eps * S[0])
    if supported is not None:
        used &= supported[:r].to(used.device)
    directions = torch.nn.functional.normalize(Vt[:r][used].cpu().double(), dim=1)
    rows = plain.clone()
    turned = rows[: len(directions)]
    lengths = torch.linalg.vector_norm(turned.cpu().double(), dim=1, keepdim=True)
    turned.copy_(directions * lengths)
    return rows


def is_supported(
    confirmed: Tensor,  # (k,)
    errors: Tensor,  # (k,)
) -> Tensor:  # (k,), bool
    """
    Tell which directions the other half of the samples has, see `maths.ranks.confirm`.

    A weight with a single row or column has nothing to take an error from, so nothing of it is supported.
    """
    return torch.gt(confirmed, SUPPORTED * errors) & torch.gt(errors, 0)
