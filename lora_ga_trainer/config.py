"""The user's choices: one dataclass, checked when it is made."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from .maths.inits import INITS
from .maths.ranks import DEFAULT_RULE, RULES
from .maths.whitening import MOST
from .optimizers.adamw import STATE_DTYPES
from .optimizers.registry import OPTIMIZERS, ChosenOptimizer, OptimizerEntry, corrections


DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "unit", "gd", "matched", "weight_svd")
ESTIMATORS = ("sketch", "exact")
PROBE_ORDERS = ("random", "train")
RANKS = ("given", "auto")


# What is added to the help of a field that names an entry of a registry.
_REGISTERED: dict[str, Callable[[], str]] = {
    "init": lambda: "".join(f" {name!r} ({init.about})." for name, init in INITS.items()),
    "correction": lambda: "".join(f" {name!r} ({OPTIMIZERS[name].about})." for name in corrections()),
    "rank_rule": lambda: "".join(f" {name!r} ({rule.about})." for name, rule in RULES.items()),
}


_Class = TypeVar("_Class", bound=type)


class _FieldHelp(Mapping[str, str]):
    """The metadata of a field. What a registry adds to the help is read each time, with its newest entry."""

    def __init__(self, text: str, registered: Callable[[], str]) -> None:
        self._text, self._registered = text, registered

    def __getitem__(self, key: str) -> str:
        if key != "help":
            raise KeyError(key)
        return self._text + self._registered()

    def __iter__(self) -> Iterator[str]:
        return iter(("help",))

    def __len__(self) -> int:
        return 1

    def copy(self) -> dict[str, str]:
        """Return a plain dictionary, which argument parsers add to."""
        return dict(self)


def _document_fields(config: _Class) -> _Class:
    """Copy what the class docstring says of each field into its metadata, where argument parsers look for it."""
    if config.__doc__ is None:  # python -OO
        return config
    _, _, listed = config.__doc__.partition("Args:\n")
    for entry in re.split(r"\n {8}(?=\w)", listed.partition("\n\n")[0].lstrip()):
        name, _, text = entry.partition(": ")
        metadata = _FieldHelp(" ".join(text.split()), _REGISTERED.get(name, str))
        vars(config)["__dataclass_fields__"][name].metadata = metadata
    return config


class _DefaultGamma(float):
    """The gamma of an init where the user named none. It gives way to that of another init, as `None` does."""


@_document_fields
@dataclass
class LoRAGAConfig:
    """
    Say how an adapter starts.

    Every field has the default of its paper or of a measurement named beside it, and every value is checked here,
    before a model is loaded.

    Args:
        init: Where the adapter starts: a name of the registry `INITS`, or 'none' (PEFT's own start; the trainer is
            then transformers.Trainer to the bit, unless head_warmup_steps, a correction or another optimizer is set).
        num_samples: Training examples that the gradient is averaged over, counted over all processes. Micro-batches
            are used whole, so it may be a few more; the report says how many.
        direction: LoRA-GA: which of the top 2r singular pairs of the gradient go to A and which to B. 'ArB2r': A the
            first r, B the next r; 'A2rBr': the reverse; 'ArBr': alternating; 'random': a seeded split.
        scale: LoRA-GA: the common length c of the rows of A0 and the columns of B0. 'stable': out^(1/4)/sqrt(gamma);
            'unit': 1; 'gd': 1/s; 'matched': sqrt(out/(3(in+out))), with which AdamW's first step moves a weight as far
            as from plain LoRA's start; 'weight_svd': mean of sqrt(S_W[:r]/s) over the singular values of the base
            weight.
        gamma: The larger, the shorter the start. Default: 16 for LoRA-GA, 128 for LoRA-One (the papers').
        whitening: Exponent w, from 0 to 0.5, of (P + .01)^-w G (Q + .01)^-w, whose directions are taken instead of
            those of the gradient G. P and Q are mean squares of the output-gradients and inputs by feature, each
            divided by its mean. A sketch then keeps twice as many columns. LoRA-One maps the result back, see
            docs/maths.md.
        supported_only: gradient_directions: take singular vectors of one half of the samples, and of these only the
            ones that the other half has by two standard errors; the other rows of A stay as PEFT drew them. Needs
            estimator='exact'.
        estimator: 'sketch' keeps small products of the gradient with test matrices; 'exact' keeps all of it in fp32.
            Layers for which the exact form is smaller than the sketch use it by themselves.
        sketch_size: Columns k of the sketch, at least as many as the init uses directions: 2r for LoRA-GA, r for the
            others, twice that with whitening. Default: 4 times as many, at the largest rank;
            lora_ga_trainer.gradients.sketch says what each size keeps.
        min_energy_kept: Share of the energy of the gradient's best directions that a sketch has to keep, of the first
            r and of the next r. A layer that by the sketch's own estimate keeps less is seen in a second pass over the
            same samples, which costs as much as the first one; without such a layer there is none. None: never look
            again.
        ranks: 'given': the layers have the ranks of the LoraConfig. 'auto': they are planned before training, by
            rank_rule and under rank_budget, and the adapter is made with them. Needs LoRAGATrainer with `peft_config`,
            on one process or DDP.
        rank_budget: Parameters that an adapter of planned ranks may have, those of its factors. Default: as many as
            the LoraConfig asks for.
        rank_rule: How parameters are shared out among layers: a name of the registry `RULES`.
        find_learning_rate: Find the learning rate when training begins, from the loss along the optimizer's first
            updates. It replaces that of the training arguments. For losses that predict tokens.
        correction: How the optimizer corrects the adapter's gradients (LoRA-Pro, arXiv 2407.18242). 'lora_pro': the
            optimizer of the training arguments, whichever it is, steps with corrected gradients. 'lora_pro_adamw':
            AdamW on the equivalent gradient of the full weight; it keeps two buffers of the size of every adapted
            weight and wants a learning rate of full fine-tuning. Needs LoRAGATrainer or LoRAGAMixin.
        lora_pro_state_dtype: Dtype of the moments that 'lora_pro_adamw' keeps: 'float32' or 'bfloat16'.
        lora_pro_offload_state: Keep the moments of 'lora_pro_adamw' in the host's memory.
        loraplus_lr_ratio: Use PEFT's LoRA+ optimizer: the learning rate of B is this many times that of A (arXiv
            2402.12354). Not together with a correction. Needs LoRAGATrainer or LoRAGAMixin.
        riemannian_reg: Use PEFT's Riemannian-preconditioned optimizer with this damping (arXiv 2402.02347; LoRA-One's
            preconditioner). Not together with a correction or init='lora_ga'. PEFT puts every parameter into one
            group, so weight decay reaches biases too. Needs LoRAGATrainer or LoRAGAMixin.
        train_A: False freezes A, so that B alone is trained (arXiv 2402.16842): half the optimizer's state, and a
            problem that is convex wherever the loss is convex in the weight. With init='none' A is as PEFT has drawn
            it. An anchored init gives A its directions of the gradient and B starts at 0. There is nothing to anchor
            then, and the adapter is a plain one of rank r. Not together with a correction, loraplus_lr_ratio or
            riemannian_reg.
        factor_dropout: Probability with which each column of A and each row of B is dropped in a training step (LoRA
            dropout, arXiv 2404.09610); `lora_dropout` of PEFT drops inputs token by token. Not together with a
            correction.
        factor_dropout_ensemble: Predictions that an evaluation averages, each with masks of its own. 0: one
            prediction without masks. Needs LoRAGATrainer or LoRAGAMixin.
        head_warmup_steps: Steps that train only `modules_to_save` (a fresh classification head, say) before the
            gradient is taken, so that it is not the gradient of a random head.
        head_warmup_learning_rate: Learning rate of the AdamW that runs the head's warm-up steps.
        allow_unreached: Leave an adapted layer that the loss never reaches (a pooler, a fused projection) at PEFT's
            own start; a warning and the report name it. False: raise instead.
        probe_file: A .safetensors file for the gradient estimate. If it exists it is read instead of running the probe
            (it must come from the same base, the same heads in `modules_to_save`, data and settings); otherwise it is
            written.
        probe_order: Which examples the probe reads. 'random' draws them from the data set by probe_seed, so that
            sorted or length-grouped data does not bias the gradient; 'train' reads the first that training reads. A
            stream is read in its own order, and so is what a trainer with its own sampler or data loader reads.
        probe_seed: Seed of the random probe_order, of the sketch's test matrices and of the 'random' direction.

    Raises:
        `ValueError`: naming the field, the value and what is allowed.
    """

    init: str = "lora_ga"
    num_samples: int = 64
    direction: str = "ArB2r"
    scale: str = "stable"
    gamma: float | None = None
    whitening: float = 0.0
    supported_only: bool = False
    estimator: str = "sketch"
    sketch_size: int | None = None
    min_energy_kept: float | None = 0.9
    ranks: str = "given"
    rank_budget: int | None = None
    rank_rule: str = DEFAULT_RULE
    find_learning_rate: bool = False
    correction: str = "none"
    lora_pro_state_dtype: str = "float32"
    lora_pro_offload_state: bool = False
    loraplus_lr_ratio: float | None = None
    riemannian_reg: float | None = None
    train_A: bool = True
    factor_dropout: float = 0.0
    factor_dropout_ensemble: int = 0
    head_warmup_steps: int = 0
    head_warmup_learning_rate: float = 0.001
    allow_unreached: bool = True
    probe_file: str | None = None
    probe_order: str = "random"
    probe_seed: int = 0

    def __post_init__(self) -> None:
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
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"LoRAGAConfig: {name}={value!r} is unknown. Choose one of {', '.join(allowed)}.")
        counts = {"num_samples": 1, "sketch_size": 2, "rank_budget": 1, "head_warmup_steps": 0, "probe_seed": 0}
        for name, least in (counts | {"factor_dropout_ensemble": 0}).items():
            value = getattr(self, name)
            if name in ("sketch_size", "rank_budget") and value is None:
                continue
            if type(value) is not int or value < least:
                raise ValueError(f"LoRAGAConfig: {name}={value!r} must be a whole number of at least {least}.")
        # `dataclasses.replace` hands over the gamma that it finds: a default must not pass for the user's choice.
        if self.gamma is None or isinstance(self.gamma, _DefaultGamma):
            self.gamma = _DefaultGamma(INITS[self.init].default_gamma if self.init in INITS else 16.0)
        for name in ("gamma", "head_warmup_learning_rate", "loraplus_lr_ratio", "riemannian_reg"):
            value = getattr(self, name)
            if value is None and name in ("loraplus_lr_ratio", "riemannian_reg"):
                continue
            if type(value) not in (int, float, _DefaultGamma) or not 0 < value < math.inf:
                raise ValueError(
                    f"LoRAGAConfig: {name}={value!r} must be a number greater than 0. (YAML reads 1e-3 as a word and "
                    "1.0e-3 as a number.)"
                )
        share = self.min_energy_kept
        if share is not None and (type(share) not in (int, float) or not 0 < share <= 1):
            raise ValueError(
                f"LoRAGAConfig: min_energy_kept={share!r} must be a number greater than 0, at most 1, or None, which "
                "looks at no layer twice."
            )
        switches = ("supported_only", "allow_unreached", "find_learning_rate", "lora_pro_offload_state", "train_A")
        for name in switches:
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"LoRAGAConfig: {name}={getattr(self, name)!r} must be True or False.")
        if not isinstance(self.probe_file, (str, type(None))):
            raise ValueError(f"LoRAGAConfig: probe_file={self.probe_file!r} must be a path as a string, or None.")

        self._require_read_fields()
        self._require_sound_directions()
        self._require_planned_ranks()
        self._require_one_optimizer()
        self._require_sound_dropout()

    def _require_sound_dropout(self) -> None:
        p, members = self.factor_dropout, self.factor_dropout_ensemble
        if type(p) not in (int, float) or not 0 <= p < 1:
            raise ValueError(f"LoRAGAConfig: factor_dropout={p!r} must be a probability from 0 to below 1.")
        if p > 0 and self.correction != "none":
            raise ValueError(
                f"LoRAGAConfig: factor_dropout={p} does not go with correction={self.correction!r}, which takes the "
                "gradient of A for s B^T G: of masked factors it is another one. Choose one of them."
            )
        if members > 0 and p == 0:
            raise ValueError(
                f"LoRAGAConfig: factor_dropout_ensemble={members} averages over masks, and with factor_dropout=0 "
                "there are none. Set factor_dropout, or leave the ensemble out."
            )

    def _require_read_fields(self) -> None:
        """Refuse a field that the chosen init does not read: it would do nothing."""
        read = INITS[self.init].reads if self.init in INITS else frozenset()
        fields = self.__dataclass_fields__
        # Files of settings name a gamma, and `--init none` beside them is a comparison with plain LoRA.
        given = {"gamma": self.init != "none" and not isinstance(self.gamma, _DefaultGamma)}
        for name in ("direction", "scale", "whitening", "supported_only"):
            given[name] = getattr(self, name) != fields[name].default
        for name, is_given in given.items():
            if is_given and name not in read:
                raise ValueError(
                    f"LoRAGAConfig: {name}={getattr(self, name)!r} would do nothing with init={self.init!r}, which "
                    "does not read it. Leave it out, or choose an init that does."
                )

    def _require_sound_directions(self) -> None:
        w = self.whitening
        if type(w) not in (int, float) or not 0 <= w <= MOST:
            raise ValueError(f"LoRAGAConfig: whitening={w!r} must be a number from 0 to {MOST}.")
        if self.supported_only and self.probe_file is not None:
            raise ValueError(
                "LoRAGAConfig: supported_only=True asks two halves of the samples, and a probe_file holds one "
                "gradient of all. Leave one of them out."
            )
        if self.supported_only and self.estimator != "exact":
            raise ValueError(
                f"LoRAGAConfig: supported_only=True takes its error from whole gradients, and estimator="
                f"{self.estimator!r} keeps their strongest directions. Set estimator='exact', which keeps the "
                "gradients of two halves: 8 bytes for each number of every adapted weight."
            )

    def _require_planned_ranks(self) -> None:
        """Refuse a field about planned ranks where none are planned: it would do nothing."""
        for name in ("rank_budget", "rank_rule"):
            value = getattr(self, name)
            if self.ranks != "auto" and value != self.__dataclass_fields__[name].default:
                raise ValueError(
                    f"LoRAGAConfig: {name}={value!r} would do nothing with ranks={self.ranks!r}. Leave it out, or set "
                    "ranks='auto'."
                )

    @property
    def anchored(self) -> bool:
        """Whether the adapter is stored in delta form. With a frozen `A` there is no `B0` to take off again."""
        return self.train_A and self.init in INITS and INITS[self.init].anchored

    @property
    def optimizer(self) -> ChosenOptimizer:
        """The entry of `OPTIMIZERS` that the fields ask for; the Trainer's own where they ask for none."""
        return self._chosen_optimizers()[0]

    def _chosen_optimizers(self) -> list[ChosenOptimizer]:
        """List every entry that some field asks for, the one of `correction` alone if there is no other."""
        asked = [entry for entry in OPTIMIZERS.values() if self._asks_for(entry)]
        return [
            ChosenOptimizer(
                entry,
                f"{entry.chosen_by}={getattr(self, entry.chosen_by)!r}",
                {name: getattr(self, name) for name in entry.fields},
            )
            for entry in asked or [OPTIMIZERS[self.correction]]
        ]

    def _asks_for(self, entry: OptimizerEntry) -> bool:
        if entry.chosen_by == "correction":
            return entry is OPTIMIZERS[self.correction] and entry.build is not None
        return getattr(self, entry.chosen_by) is not None

    def _require_one_optimizer(self) -> None:
        """Refuse settings of which each asks for an optimizer of its own, or that would change nothing."""
        asked = self._chosen_optimizers()
        if len(asked) > 1:
            names = [
                chosen.setting if chosen.entry.chosen_by == "correction" else chosen.entry.chosen_by
                for chosen in asked
            ]
            settings = " and ".join(names)
            raise ValueError(f"LoRAGAConfig: {settings} each change the same gradients or groups. Choose one of them.")
        (chosen,) = asked
        if not self.train_A and chosen.entry.build is not None:
            raise ValueError(
                f"LoRAGAConfig: train_A=False leaves B alone to be trained, and {chosen.setting} steps A and B "
                "together. Leave one of the two out."
            )
        if chosen.entry.not_anchored is not None and self.anchored:
            raise ValueError(
                f"LoRAGAConfig: {chosen.setting} does not go with init={self.init!r}, {chosen.entry.not_anchored}"
            )
        for name, entry in OPTIMIZERS.items():
            if entry is not chosen.entry and entry.chosen_by == "correction":
                self._require_unset(name, entry)

    def _require_unset(self, name: str, entry: OptimizerEntry) -> None:
        """Refuse a field that only an optimizer which was not chosen reads."""
        for field in entry.fields:
            value = getattr(self, field)
            if value != self.__dataclass_fields__[field].default:
                raise ValueError(
                    f"LoRAGAConfig: {field}={value!r} is for correction={name!r} and would do nothing with "
                    f"correction={self.correction!r}. Leave it out, or choose that correction."
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold; `gamma` is `None` where the user named none."""
        gamma = None if isinstance(self.gamma, _DefaultGamma) else self.gamma
        return {**asdict(self), "gamma": gamma}
