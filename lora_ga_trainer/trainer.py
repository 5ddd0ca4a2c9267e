"""Trainers to swap for `transformers.Trainer`, and the mixin for any other one."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

from .adapters.dropout import dropped_factors, mean_of
from .adapters.find import find_lora_layers
from .adapters.frozen import train_both_or_B
from .adapters.host import find_hosts, require_adapter
from .adapters.storage import anchored_parameter_names, counted_norm
from .callback import LoRAGACallback
from .config import LoRAGAConfig
from .engines.support import holds_whole_gradients
from .optimizers.build import build_optimizer, require_buildable
from .optimizers.weight_decay import without_anchored
from .patches import is_of_transformers, log_without_start, put_first
from .ranks.apply import make_adapter_anew, require_planned, resumed_config
from .ranks.find import plan_ranks, require_plannable
from .ranks.plan import RankPlan
from .rates.report import RateReport
from .saving.checkpoint import load_with_adapter, save_with_adapter
from .saving.resume import checked_checkpoint, checkpoint_to_resume
from .saving.untrained import folder_of_untrained
from .starts.prepare import prepare_adapter, require_config
from .starts.report import GradientReport
from .starts.tracking import write_report


if TYPE_CHECKING:
    from torch.utils.data import Dataset

    # The class beside the mixin, whose methods it calls.
    from transformers import Trainer as _AnyTrainer
else:
    _AnyTrainer = object


class LoRAGAMixin(_AnyTrainer):
    """
    Make any Trainer subclass start its adapter from gradients.

        class MyTrainer(LoRAGAMixin, SFTTrainer): ...

    Args:
        args, kwargs: of the Trainer; its model must have an adapter by the end of its `__init__`.
        lora_ga_config: how to start; default `LoRAGAConfig()`.
        probe_dataset: examples for the probe instead of the train dataset's.

    Attributes:
        lora_ga_report (`GradientReport` or `None`): of the initialisation, once `train()` has begun.
        lora_ga_rate_report (`RateReport` or `None`): of the learning rate that was found, likewise.
    """

    overrides_trainer_methods = True  # tells LoRAGACallback that there is nothing to patch, and optimizers are built

    def __init__(
        self,
        *args: Any,
        lora_ga_config: LoRAGAConfig | None = None,
        probe_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        self.lora_ga_config = require_config(lora_ga_config)
        self._require_own_adapter()
        self._own_callbacks: list[TrainerCallback] = []
        super().__init__(*args, **kwargs)
        require_buildable(self, self.lora_ga_config.optimizer)
        self._lora_ga_callback = LoRAGACallback(self, self.lora_ga_config, probe_dataset)
        self.add_callback(self._lora_ga_callback)

    def add_callback(self, callback: Any) -> None:
        """Add a callback as the Trainer does, and remember those that the trainer's own constructor adds."""
        super().add_callback(callback)
        if not hasattr(self, "_lora_ga_callback"):
            added = self.callback_handler.callbacks[-1]
            if not is_of_transformers(added):
                self._own_callbacks.append(added)

    @property
    def lora_ga_report(self) -> GradientReport | None:
        return self._lora_ga_callback.report

    @property
    def lora_ga_rate_report(self) -> RateReport | None:
        return self._lora_ga_callback.rate.report

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a new model for a trial and prepare its adapter."""
        model = self._adapt(super().call_model_init(trial))
        if self.lora_ga_config.init != "none":
            prepare_adapter(model, self.lora_ga_config)
        train_both_or_B(model, self.lora_ga_config.train_A, self.lora_ga_config.init)
        return model

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train as the Trainer does, after a look at the checkpoint to resume from.

        With `resume_from_checkpoint=True` the newest one that was written to its end is taken.
        """
        put_first(self, self._lora_ga_callback, self._own_callbacks)
        checkpoint = checked_checkpoint(self, resume_from_checkpoint)
        self._lora_ga_callback.resumes_from = folder_of_untrained(self, checkpoint)
        return super().train(checkpoint, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None, *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does, with the time of the start left out of the runtime and the rates."""
        callback = vars(self).get("_lora_ga_callback")  # not there before the end of `__init__`
        seconds = 0.0 if callback is None else callback.start_seconds
        log_without_start(super().log, seconds, logs, start_time, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save as the Trainer does, the adapter's own files included."""
        save = lambda whole: super(LoRAGAMixin, self)._save(output_dir, whole)
        save_with_adapter(self, save, output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """Load as the Trainer does, or the adapter alone for models that it can't load."""
        load = lambda: super(LoRAGAMixin, self)._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        load_with_adapter(self, load, resume_from_checkpoint, best=False)

    def _load_best_model(self) -> None:
        load_with_adapter(self, super()._load_best_model, self.state.best_model_checkpoint or "", best=True)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Name the decayed parameters, without anchored ones unless the optimizer decays their net update."""
        names = super().get_decay_parameter_names(model)
        decays_net_update = self.lora_ga_config.optimizer.entry.decays_net_update
        return names if decays_net_update else without_anchored(names, model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """
        Make the Trainer's optimizer from `TrainingArguments.optim`, and what the config asks for around it.

        `max_grad_norm` is applied before the correction, to the gradients of the loss: see [`LoRAProOptimizer`].
        """
        create = lambda: super(LoRAGAMixin, self).create_optimizer(*(() if model is None else (model,)))
        self.optimizer = build_optimizer(self, self.lora_ga_config.optimizer, create)
        return self.optimizer

    def prediction_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """Predict as the Trainer does, or as the mean of `factor_dropout_ensemble` predictions with masked factors."""
        config = self.lora_ga_config
        predict = lambda: super(LoRAGAMixin, self).prediction_step(model, *args, **kwargs)
        if config.factor_dropout_ensemble == 0:
            return predict()
        layers = find_lora_layers(self.accelerator.unwrap_model(model))
        with dropped_factors(layers, config.factor_dropout, in_eval=True, generator=self._mask_generator):
            return mean_of(config.factor_dropout_ensemble, predict)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Every evaluation sees the same masks, and training's random numbers are left alone.
        self._mask_generator = torch.Generator().manual_seed(self.args.seed)
        return super().evaluation_loop(*args, **kwargs)

    def _adapt(self, model: nn.Module) -> nn.Module:
        """Put an adapter on a model; here it must have one already."""
        return model

    def _require_own_adapter(self) -> None:
        """Refuse planned ranks for an adapter that another one has made."""
        if self.lora_ga_config.ranks != "given":
            raise ValueError(
                f"{type(self).__name__}: ranks={self.lora_ga_config.ranks!r} makes the adapter anew, and this one was "
                "not made by LoRAGATrainer. Pass the plain model with `peft_config=` to LoRAGATrainer, or plan first: "
                "`plan_ranks(trainer).lora_config(lora)` is the LoraConfig to make the adapter with."
            )

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """Clip to `max_grad_norm`, with the gradient of an anchored `A` counted once in the norm."""
        if not self._counts_tied_halves(model):
            step = self._lora_ga_callback.engine_step  # has clipped, where there is one
            return super()._clip_grad_norm(model) if step is None else step.norm
        self.accelerator.unscale_gradients()
        norm = counted_norm(model)
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm for the log, with the gradient of an anchored `A` counted once."""
        if grad_norm is None and self._counts_tied_halves(model):
            grad_norm = counted_norm(model)
        return super()._get_grad_norm(model, grad_norm)

    def _counts_tied_halves(self, model: nn.Module) -> bool:
        return holds_whole_gradients(self) and bool(anchored_parameter_names(model))


class _WrapsModel(LoRAGAMixin):
    """Adds `peft_config=` to a Trainer that takes a plain model."""

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *positional: Any,
        peft_config: LoraConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self._peft_config = peft_config
        self._drawn_from = torch.get_rng_state()
        self.lora_ga_rank_plan: RankPlan | None = None
        self._has_ranks = False
        super().__init__(None if model is None else self._adapt(model), args, *positional, **kwargs)
        if self.lora_ga_config.ranks == "auto":
            require_plannable(self)
            self._require_no_optimizer()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as [`LoRAGAMixin`] does; with `ranks="auto"` the adapter is first given its ranks."""
        if self.lora_ga_config.ranks == "auto" and not self._has_ranks:
            self._give_ranks(checkpoint_to_resume(self, resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _give_ranks(self, checkpoint: str | None) -> None:
        """Make the adapter anew, with planned ranks or with those of the checkpoint that is resumed."""
        config, lora = self.lora_ga_config, self._peft_config
        assert lora is not None
        if checkpoint is None:
            probe_dataset = self._lora_ga_callback.probe_dataset
            plan = plan_ranks(self, config.rank_budget, config.rank_rule, probe_dataset=probe_dataset)
            self._peft_config = plan.lora_config(lora)
        else:
            plan, self._peft_config = None, resumed_config(checkpoint, require_adapter(self.model), lora)
        make_adapter_anew(self, config, self._peft_config, self._drawn_from)
        if plan is not None:
            require_planned(self.model, plan)
            write_report(self, plan, "lora_ga_ranks.json")
        self.lora_ga_rank_plan, self._has_ranks = plan, True

    def _require_own_adapter(self) -> None:
        if self._peft_config is None:
            super()._require_own_adapter()

    def _require_no_optimizer(self) -> None:
        if self.optimizer is not None:
            raise ValueError(
                f"{type(self).__name__}: ranks='auto' makes the adapter anew when training begins, and the optimizer "
                "that was passed holds the parameters of the first one. Pass `optimizer_cls_and_kwargs=` instead of "
                "`optimizers=`."
            )

    def _adapt(self, model: nn.Module) -> nn.Module:
        if self._peft_config is None:
            return model
        if find_hosts(model):
            raise ValueError(
                "peft_config was passed with a model that has an adapter already. Pass one of the two: the plain "
                "model with `peft_config`, or the model with its adapter alone."
            )
        self._drawn_from = torch.get_rng_state()
        # A copy: PEFT and anchoring both write into the config of the adapter.
        return get_peft_model(model, copy.deepcopy(self._peft_config))


class LoRAGATrainer(_WrapsModel, Trainer):
    """
    `transformers.Trainer` whose LoRA adapter starts where the gradient of the full weights points.

    Args:
        model: with an adapter, whichever way it was added, or a plain model with `peft_config`.
        args, ...: every other argument of `transformers.Trainer`, unchanged.
        peft_config (`peft.LoraConfig`, *optional*): wraps a plain `model`, or each model that `model_init` makes.
        lora_ga_config (`LoRAGAConfig`, *optional*): how to start; default LoRA-GA on 64 examples.
        probe_dataset (*optional*): examples for the probe instead of the train dataset's.

    Attributes:
        lora_ga_rank_plan (`RankPlan` or `None`): of the ranks, once `train()` has planned them.

    Raises:
        `ValueError`: before training starts, if the adapter can't be given a start; each message says what to do.
    """


class Seq2SeqLoRAGATrainer(_WrapsModel, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with the start of [`LoRAGATrainer`] and its additional arguments."""
