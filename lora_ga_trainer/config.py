"""What a user can choose: one dataclass, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


INITS = ("lora_ga", "lora_one", "none")
DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "unit", "gd", "weight_svd")
ESTIMATORS = ("sketch", "exact")
CORRECTIONS = ("none",)
DEFAULT_GAMMA = {"lora_ga": 16.0, "lora_one": 128.0, "none": 16.0}


@dataclass
class LoRAGAConfig:
    """
    Say how an adapter starts.

    Every field has the default of its paper or of a measurement named beside it, and every value is checked here,
    before a model is loaded.

    Raises:
        `ValueError`: naming the field, the value and what is allowed.
    """

    init: str = field(
        default="lora_ga",
        metadata={
            "help": "Where the adapter starts: 'lora_ga' (arXiv 2407.05000), 'lora_one' (arXiv 2502.01235), or 'none' "
            "(PEFT's own start; the trainer is then transformers.Trainer to the bit, unless head_warmup_steps is set)."
        },
    )
    num_samples: int = field(
        default=64,
        metadata={"help": "Training examples that the gradient is averaged over, counted over all processes."},
    )
    direction: str = field(
        default="ArB2r",
        metadata={
            "help": "LoRA-GA: which of the top 2r singular pairs of the gradient go to A and which to B. 'ArB2r': A "
            "the first r, B the next r; 'A2rBr': the reverse; 'ArBr': alternating; 'random': a seeded split."
        },
    )
    scale: str = field(
        default="stable",
        metadata={
            "help": "LoRA-GA: the common length c of the rows of A0 and the columns of B0. 'stable': "
            "out^(1/4)/sqrt(gamma); 'unit': 1; 'gd': 1/s; 'weight_svd': mean of sqrt(S_W[:r]/s) over the singular "
            "values of the base weight."
        },
    )
    gamma: float | None = field(
        default=None,
        metadata={
            "help": "The larger, the shorter the start. Default: 16 for LoRA-GA, 128 for LoRA-One (the papers')."
        },
    )
    estimator: str = field(
        default="sketch",
        metadata={
            "help": "'sketch' keeps small products of the gradient with test matrices; 'exact' keeps all of it in "
            "fp32. Layers for which the exact form is smaller than the sketch use it by themselves."
        },
    )
    sketch_size: int | None = field(
        default=None,
        metadata={
            "help": "Columns k of the sketch, at least 2r. Default: 12 times the largest rank; lora_ga_trainer.sketch "
            "says what each size keeps."
        },
    )
    correction: str = field(
        default="none",
        metadata={"help": "How the optimizer corrects the adapter's gradients: 'none'."},
    )
    head_warmup_steps: int = field(
        default=0,
        metadata={
            "help": "Steps that train only `modules_to_save` (a fresh classification head, say) before the gradient "
            "is taken, so that it is not the gradient of a random head."
        },
    )
    head_warmup_learning_rate: float = field(
        default=1e-3,
        metadata={"help": "Learning rate of the AdamW that runs the head's warm-up steps."},
    )
    allow_unreached: bool = field(
        default=False,
        metadata={
            "help": "Leave an adapted layer that the loss never reaches at PEFT's own start instead of raising."
        },
    )
    probe_file: str | None = field(
        default=None,
        metadata={
            "help": "A .safetensors file for the gradient estimate. If it exists it is read instead of running the "
            "probe (it must come from the same base, data and settings); otherwise it is written."
        },
    )
    probe_seed: int = field(
        default=0,
        metadata={"help": "Seed of the sketch's test matrices and of the 'random' direction."},
    )

    def __post_init__(self) -> None:
        for name, allowed in (
            ("init", INITS),
            ("direction", DIRECTIONS),
            ("scale", SCALES),
            ("estimator", ESTIMATORS),
            ("correction", CORRECTIONS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"LoRAGAConfig: {name}={value!r} is unknown. Choose one of {', '.join(allowed)}.")
        for name, least in (("num_samples", 1), ("sketch_size", 2), ("head_warmup_steps", 0), ("probe_seed", 0)):
            value = getattr(self, name)
            if name == "sketch_size" and value is None:
                continue
            if type(value) is not int or value < least:
                raise ValueError(f"LoRAGAConfig: {name}={value!r} must be a whole number of at least {least}.")
        if self.gamma is None:
            self.gamma = DEFAULT_GAMMA[self.init]
        for name in ("gamma", "head_warmup_learning_rate"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ValueError(
                    f"LoRAGAConfig: {name}={value!r} must be a number greater than 0. (YAML reads 1e-3 as a word and "
                    "1.0e-3 as a number.)"
                )
        if type(self.allow_unreached) is not bool:
            raise ValueError(f"LoRAGAConfig: allow_unreached={self.allow_unreached!r} must be True or False.")
        if not isinstance(self.probe_file, (str, type(None))):
            raise ValueError(f"LoRAGAConfig: probe_file={self.probe_file!r} must be a path as a string, or None.")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold."""
        return asdict(self)
