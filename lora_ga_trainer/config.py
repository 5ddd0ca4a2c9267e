"""The user's choices: one dataclass, checked when it is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .config_help import document_fields
from .config_rules import DefaultGamma, require_sound
from .maths.inits import INITS
from .maths.ranks import DEFAULT_RULE, RULES
from .optimizers.registry import OPTIMIZERS, ChosenOptimizer, OptimizerEntry, corrections


# What is added to the help of a field that names an entry of a registry.
_REGISTERED = {
    "init": lambda: "".join(f" {name!r} ({init.about})." for name, init in INITS.items()),
    "correction": lambda: "".join(f" {name!r} ({OPTIMIZERS[name].about})." for name in corrections()),
    "rank_rule": lambda: "".join(f" {name!r} ({rule.about})." for name, rule in RULES.items()),
}


@document_fields(_REGISTERED)
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
        correction: What the optimizer does with the adapter's gradients (LoRA-Pro, arXiv 2407.18242). 'lora_pro': the
            optimizer of the training arguments, whichever it is, steps with corrected gradients. 'lora_pro_adamw':
            AdamW on the equivalent gradient of the full weight; it keeps two buffers of the size of every adapted
            weight and wants a learning rate of full fine-tuning. 'muon': torch's Muon on each factor, at a rate like
            AdamW's (arXiv 2502.16982); not with init='lora_ga'. Needs LoRAGATrainer or LoRAGAMixin.
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
        require_sound(self)
        # `dataclasses.replace` hands over the gamma that it finds: a default must not pass for the user's choice.
        if self.gamma is None or isinstance(self.gamma, DefaultGamma):
            self.gamma = DefaultGamma(INITS[self.init].default_gamma if self.init in INITS else 16.0)

    @property
    def anchored(self) -> bool:
        """Whether the adapter is stored in delta form. With a frozen `A` there is no `B0` to take off again."""
        return self.train_A and self.init in INITS and INITS[self.init].anchored

    @property
    def optimizer(self) -> ChosenOptimizer:
        """The entry of `OPTIMIZERS` that the fields ask for; the Trainer's own where they ask for none."""
        return self.chosen_optimizers()[0]

    def chosen_optimizers(self) -> list[ChosenOptimizer]:
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

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold; `gamma` is `None` where the user named none."""
        gamma = None if isinstance(self.gamma, DefaultGamma) else self.gamma
        return {**asdict(self), "gamma": gamma}
