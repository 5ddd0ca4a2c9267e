"""What the values of a `LoRAGAConfig` may be, and which of them go together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .maths.inits import INITS
from .maths.ranks import RULES
from .maths.whitening import MOST
from .optimizers.adamw import STATE_DTYPES
from .optimizers.registry import OPTIMIZERS, OptimizerEntry, corrections


if TYPE_CHECKING:
    from .config import LoRAGAConfig

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "unit", "gd", "matched", "weight_svd")
ESTIMATORS = ("sketch", "exact")
PROBE_ORDERS = ("random", "train")
RANKS = ("given", "auto")

# The least value of each whole number.
_COUNTS = {
    "num_samples": 1,
    "sketch_size": 2,
    "rank_budget": 1,
    "head_warmup_steps": 0,
    "probe_seed": 0,
    "factor_dropout_ensemble": 0,
}
_POSITIVE = ("gamma", "head_warmup_learning_rate", "loraplus_lr_ratio", "riemannian_reg")
_SWITCHES = ("supported_only", "allow_unreached", "find_learning_rate", "lora_pro_offload_state", "train_A")
# Fields that may be `None`.
_OPTIONAL = ("sketch_size", "rank_budget", "gamma", "loraplus_lr_ratio", "riemannian_reg")


class DefaultGamma(float):
    """The gamma of an init where the user named none. It gives way to that of another init, as `None` does."""


def require_sound(config: LoRAGAConfig) -> None:
    """
    Check every value, and then which of them go together.

    Raises:
        `ValueError`: naming the field, the value and what is allowed.
    """
    _require_names(config)
    _require_numbers(config)
    for name in _SWITCHES:
        if type(getattr(config, name)) is not bool:
            raise ValueError(f"LoRAGAConfig: {name}={getattr(config, name)!r} must be True or False.")
    if not isinstance(config.probe_file, (str, type(None))):
        raise ValueError(f"LoRAGAConfig: probe_file={config.probe_file!r} must be a path as a string, or None.")
    _require_read_fields(config)
    _require_sound_directions(config)
    _require_planned_ranks(config)
    _require_one_optimizer(config)
    _require_sound_dropout(config)


def _require_names(config: LoRAGAConfig) -> None:
    for name, allowed in (
        ("init", (*INITS, "none")),
        ("direction", DIRECTIONS),
        ("scale", SCALES),
        ("estimator", ESTIMATORS),
        ("probe_order", PROBE_ORDERS),
        ("ranks", RANKS),
        ("rank_rule", tuple(RULES)),
        ("correction", corrections()),
        ("lora_pro_state_dtype", STATE_DTYPES),
    ):
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(f"LoRAGAConfig: {name}={value!r} is unknown. Choose one of {', '.join(allowed)}.")


def _require_numbers(config: LoRAGAConfig) -> None:
    for name, least in _COUNTS.items():
        value = getattr(config, name)
        if value is None and name in _OPTIONAL:
            continue
        if type(value) is not int or value < least:
            raise ValueError(f"LoRAGAConfig: {name}={value!r} must be a whole number of at least {least}.")
    for name in _POSITIVE:
        value = getattr(config, name)
        if value is None and name in _OPTIONAL:
            continue
        if type(value) not in (int, float, DefaultGamma) or not 0 < value < math.inf:
            raise ValueError(
                f"LoRAGAConfig: {name}={value!r} must be a number greater than 0. (YAML reads 1e-3 as a word and "
                "1.0e-3 as a number.)"
            )
    share = config.min_energy_kept
    if share is not None and (type(share) not in (int, float) or not 0 < share <= 1):
        raise ValueError(
            f"LoRAGAConfig: min_energy_kept={share!r} must be a number greater than 0, at most 1, or None, which "
            "looks at no layer twice."
        )


def _require_read_fields(config: LoRAGAConfig) -> None:
    """Refuse a field that the chosen init does not read: it would do nothing."""
    read = INITS[config.init].reads if config.init in INITS else frozenset()
    fields = config.__dataclass_fields__
    # Files of settings name a gamma, and `--init none` beside them is a comparison with plain LoRA.
    given = {"gamma": config.init != "none" and not isinstance(config.gamma, (DefaultGamma, type(None)))}
    for name in ("direction", "scale", "whitening", "supported_only"):
        given[name] = getattr(config, name) != fields[name].default
    for name, is_given in given.items():
        if is_given and name not in read:
            raise ValueError(
                f"LoRAGAConfig: {name}={getattr(config, name)!r} would do nothing with init={config.init!r}, which "
                "does not read it. Leave it out, or choose an init that does."
            )


def _require_sound_directions(config: LoRAGAConfig) -> None:
    w = config.whitening
    if type(w) not in (int, float) or not 0 <= w <= MOST:
        raise ValueError(f"LoRAGAConfig: whitening={w!r} must be a number from 0 to {MOST}.")
    if config.supported_only and config.probe_file is not None:
        raise ValueError(
            "LoRAGAConfig: supported_only=True asks two halves of the samples, and a probe_file holds one "
            "gradient of all. Leave one of them out."
        )
    if config.supported_only and config.estimator != "exact":
        raise ValueError(
            f"LoRAGAConfig: supported_only=True takes its error from whole gradients, and estimator="
            f"{config.estimator!r} keeps their strongest directions. Set estimator='exact', which keeps the "
            "gradients of two halves: 8 bytes for each number of every adapted weight."
        )


def _require_planned_ranks(config: LoRAGAConfig) -> None:
    """Refuse a field about planned ranks where none are planned: it would do nothing."""
    for name in ("rank_budget", "rank_rule"):
        value = getattr(config, name)
        if config.ranks != "auto" and value != config.__dataclass_fields__[name].default:
            raise ValueError(
                f"LoRAGAConfig: {name}={value!r} would do nothing with ranks={config.ranks!r}. Leave it out, or set "
                "ranks='auto'."
            )


def _require_one_optimizer(config: LoRAGAConfig) -> None:
    """Refuse settings of which each asks for an optimizer of its own, or that would change nothing."""
    asked = config.chosen_optimizers()
    if len(asked) > 1:
        names = [
            chosen.setting if chosen.entry.chosen_by == "correction" else chosen.entry.chosen_by for chosen in asked
        ]
        settings = " and ".join(names)
        raise ValueError(f"LoRAGAConfig: {settings} each change the same gradients or groups. Choose one of them.")
    (chosen,) = asked
    if not config.train_A and chosen.entry.build is not None:
        raise ValueError(
            f"LoRAGAConfig: train_A=False leaves B alone to be trained, and {chosen.setting} steps A and B "
            "together. Leave one of the two out."
        )
    if chosen.entry.not_anchored is not None and config.anchored:
        raise ValueError(
            f"LoRAGAConfig: {chosen.setting} does not go with init={config.init!r}, {chosen.entry.not_anchored}"
        )
    for name, entry in OPTIMIZERS.items():
        if entry is not chosen.entry and entry.chosen_by == "correction":
            _require_unset(config, name, entry)


def _require_unset(config: LoRAGAConfig, name: str, entry: OptimizerEntry) -> None:
    """Refuse a field that only an optimizer which was not chosen reads."""
    for field in entry.fields:
        value = getattr(config, field)
        if value != config.__dataclass_fields__[field].default:
            raise ValueError(
                f"LoRAGAConfig: {field}={value!r} is for correction={name!r} and would do nothing with "
                f"correction={config.correction!r}. Leave it out, or choose that correction."
            )


def _require_sound_dropout(config: LoRAGAConfig) -> None:
    p, members = config.factor_dropout, config.factor_dropout_ensemble
    if type(p) not in (int, float) or not 0 <= p < 1:
        raise ValueError(f"LoRAGAConfig: factor_dropout={p!r} must be a probability from 0 to below 1.")
    if p > 0 and config.correction != "none":
        raise ValueError(
            f"LoRAGAConfig: factor_dropout={p} does not go with correction={config.correction!r}, which takes the "
            "gradient of A for s B^T G: of masked factors it is another one. Choose one of them."
        )
    if members > 0 and p == 0:
        raise ValueError(
            f"LoRAGAConfig: factor_dropout_ensemble={members} averages over masks, and with factor_dropout=0 "
            "there are none. Set factor_dropout, or leave the ensemble out."
        )
