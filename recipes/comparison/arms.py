"""Arms of a comparison: a method, options of its own, and a correction."""

import json
import re
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from finetuning.arguments import LoraArguments

from comparison.methods import METHODS, Method
from lora_ga_trainer import OPTIMIZERS, LoRAGAConfig


# What an arm says itself, so that it can't be said for all arms at once.
ARM_FIELDS = ("init", "correction", "gamma", "loraplus_lr_ratio", "riemannian_reg")
CORRECTIONS = [name for name, entry in OPTIMIZERS.items() if entry.chosen_by == "correction" and entry.build]
_CONFIG_FIELDS = {f.name for f in fields(LoRAGAConfig)} - {"init", "correction", "probe_file"}
_LORA_FIELDS = {f.name for f in fields(LoraArguments)}


@dataclass(frozen=True)
class Arm:
    """
    One thing that is compared.

    Args:
        name: as it was asked for, `method[:option=value]...[+correction]`.
        method: its name in `METHODS`.
        config: of the start and the correction; `None` stands for `"none"`.
        lora: of the adapter.
    """

    name: str
    method: str
    config: LoRAGAConfig
    lora: LoraArguments

    @property
    def how(self) -> Method:
        return METHODS[self.method]

    @property
    def rate_factor(self) -> float:
        """Rate of a step against plain LoRA's: an optimizer that steps the weight itself takes full fine-tuning's."""
        return 0.1 if self.config.optimizer.entry.steps_weight else self.how.rate_factor

    @property
    def slug(self) -> str:
        """The name as part of a path."""
        return re.sub(r"[^\w.=+-]", "_", self.name)


def parse_arms(text: str, config: LoRAGAConfig, lora: LoraArguments) -> list[Arm]:
    """
    Read a list such as `lora,lora_ga:gamma=64+lora_pro,full`.

    Args:
        text: names separated by commas.
        config: settings that all arms share.
        lora: the adapter that all arms share.

    Raises:
        `ValueError`: naming the arm and what it may be, before anything is loaded.
    """
    defaults = LoRAGAConfig()
    for name in ARM_FIELDS:
        if getattr(config, name) != getattr(defaults, name):
            raise ValueError(
                f"{name}={getattr(config, name)!r} is what arms differ in. Write it into the arm, as in --arms "
                "lora,lora_ga:gamma=64+lora_pro."
            )
    if config.probe_file is not None:
        raise ValueError(f"probe_file={config.probe_file!r}: the comparison keeps probes in its own folder.")
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"arms={text!r} names no arm. Choose from {', '.join(METHODS)}.")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"arms: {name!r} stands there twice.")
    arms = [_parse_arm(name, config, lora) for name in names]
    slugs = [arm.slug for arm in arms]
    for arm in arms:
        if slugs.count(arm.slug) > 1:
            raise ValueError(f"arms: {arm.name!r} shares its folder {arm.slug!r} with another arm. Leave one out.")
    return arms


def _parse_arm(name: str, config: LoRAGAConfig, lora: LoraArguments) -> Arm:
    head, plus, correction = name.partition("+")
    method, *options = head.split(":")
    if method not in METHODS:
        close = get_close_matches(method, METHODS, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Choose from {', '.join(METHODS)}."
        raise ValueError(f"arm {name!r}: there is no method {method!r}. {hint}")
    if plus and correction not in CORRECTIONS:
        raise ValueError(f"arm {name!r}: {correction!r} is not a correction. Use {' or '.join(CORRECTIONS)}.")
    if plus and not METHODS[method].correctable:
        raise ValueError(f"arm {name!r}: {method} has no plain pairs of factors, which {correction} corrects.")
    chosen = dict(_parse_option(name, option) for option in options)
    shared = {**config.to_dict(), "gamma": None}  # an arm that names none has the default of its init
    of_arm = {"init": METHODS[method].init, "correction": correction or "none", **METHODS[method].settings}
    try:
        arm_config = LoRAGAConfig(**{**shared, **of_arm, **_only(chosen, _CONFIG_FIELDS)})
        arm_lora = replace(lora, **_only(chosen, _LORA_FIELDS))
    except (ValueError, TypeError) as error:
        raise ValueError(f"arm {name!r}: {error}") from error
    if method == "full" and arm_config.head_warmup_steps > 0:
        raise ValueError(
            f"arm {name!r}: head_warmup_steps={arm_config.head_warmup_steps} trains `modules_to_save`, and full "
            "fine-tuning has none. Leave this arm out, or compare without the warm-up."
        )
    return Arm(name, method, arm_config, arm_lora)


def _only(options: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in names}


def _parse_option(arm: str, option: str) -> tuple[str, Any]:
    key, equals, value = option.partition("=")
    if not equals:
        raise ValueError(f"arm {arm!r}: {option!r} is not an option. Write name=value.")
    if key not in _CONFIG_FIELDS | _LORA_FIELDS:
        close = get_close_matches(key, sorted(_CONFIG_FIELDS | _LORA_FIELDS), n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "`--help` lists the fields of LoRAGAConfig and the adapter."
        raise ValueError(f"arm {arm!r}: there is no option {key!r}. {hint}")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):  # no JSON: a word
        return key, value
