"""The two moments of a start: the adapter is prepared with the trainer, and initialised when training begins."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer, TrainerCallback

from .adapters.dropout import dropped_factors, require_droppable
from .adapters.find import find_adapted_layers, find_lora_layers
from .adapters.frozen import require_still_A, train_both_or_B
from .adapters.layer import AdaptedLayer
from .config import LoRAGAConfig
from .gradients.borrow import attribute
from .optimizers.engine_step import EngineStep, install_engine_step
from .optimizers.weight_decay import require_sound_optimizer
from .patches import patch_trainer
from .rates.apply import require_rate_can_be_found
from .rates.find import RateChoice
from .rates.report import RateReport
from .saving.record import StartRecord, record_of_model, write_record
from .saving.untrained import restore_untrained
from .starts.head_warmup import warm_heads, warm_up_heads
from .starts.prepare import only_evaluates, prepare_trainer, require_config
from .starts.report import GradientReport
from .starts.start import start_adapter
from .starts.tracking import publish


if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import TrainerControl, TrainerState, TrainingArguments


class LoRAGACallback(TrainerCallback):
    """
    Initialise the adapter of any Trainer when training begins.

        trainer.add_callback(LoRAGACallback(trainer, LoRAGAConfig()))

    The constructor makes room for an anchored adapter, so it must come before the optimizer; the gradients are
    estimated and the factors written at the first `on_train_begin` that is not a resume. Once an adapter is
    initialised it is never initialised again: not on a second `train()`, a retry of `auto_find_batch_size` or a
    resume.

    Some methods of this trainer instance are wrapped, see `lora_ga_trainer.patches`:

    * `get_decay_parameter_names` leaves anchored parameters out of weight decay.
    * `log` leaves the time of the start out of the runtime.
    * `train` checks a checkpoint before it is loaded. With `resume_from_checkpoint=True` it takes the newest that was
      written to its end.
    * `_save`, `_load_from_checkpoint` and `_load_best_model` know adapters without a `PeftModel` on top, too.

    [`LoRAGAMixin`] adds what a callback can't: it counts the tied halves once in the clipping norm, prepares the new
    model of each `hyperparameter_search` trial, and builds optimizers (`correction`, `loraplus_lr_ratio`,
    `riemannian_reg`). With the callback alone the norm counts the gradient of every anchored `A` twice.

    Args:
        trainer: the trainer the callback is added to.
        config: how to start; default `LoRAGAConfig()`.
        probe_dataset: examples for the probe instead of the train dataset's.

    Attributes:
        report (`GradientReport` or `None`): of the initialisation, after it ran.
        rate (`RateChoice`): its `report` says which learning rate was found, if the config asked for one.
        engine_step (`EngineStep` or `None`): what clips and corrects where the engine steps by itself.
        start_seconds (`float`): what the start took in the `train()` that runs or ran last; 0 without one.

    Raises:
        `ValueError`: if the model, its adapter, the data set or the optimizer can't be used, saying how to mend it.
    """

    def __init__(
        self, trainer: Trainer, config: LoRAGAConfig | None = None, probe_dataset: Dataset | None = None
    ) -> None:
        self.trainer = trainer
        self.config = require_config(config)
        self.probe_dataset = probe_dataset
        self.report: GradientReport | None = None
        self.engine_step: EngineStep | None = None
        self.start_seconds = 0.0
        self.only_finds_rate = False
        self.resumes_from: str | None = None  # the checkpoint that the `train()` which runs has loaded
        self._warm_model: Callable[[], nn.Module | None] = lambda: None
        self._dropout = ExitStack()
        self._still: Sequence[AdaptedLayer] = []  # whose `A` must get no gradient
        overrides = getattr(trainer, "overrides_trainer_methods", False)
        if not overrides:
            _require_no_optimizer(self.config)
            _require_given_ranks(self.config)
        self.rate = RateChoice(trainer, self.config, probe_dataset)
        self._evaluates = only_evaluates(trainer, probe_dataset)
        if self.config.init != "none" and not self._evaluates:
            prepare_trainer(trainer, self.config, probe_dataset)
        if not self._evaluates:
            train_both_or_B(trainer.model, self.config.train_A, self.config.init)
        if self.config.factor_dropout > 0:
            require_droppable(find_lora_layers(trainer.model))
            if self.config.factor_dropout_ensemble > 0 and not overrides:
                raise ValueError(
                    f"LoRAGACallback: factor_dropout_ensemble={self.config.factor_dropout_ensemble} changes how a "
                    "trainer evaluates, where a callback has no say. Use LoRAGATrainer or LoRAGAMixin."
                )
        if not overrides and (record_of_model(trainer.model) is not None or not self.config.train_A):
            patch_trainer(trainer, self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, self.start_seconds = self.trainer, 0.0
        model = trainer.accelerator.unwrap_model(trainer.model)
        restore_untrained(trainer, self.resumes_from)
        self.engine_step = install_engine_step(trainer, model, self.config.optimizer.entry.correct)
        if self.config.init == "none":
            if state.global_step == 0 and self._is_cold(model):
                with self._timed():
                    warm_up_heads(trainer, self.config)
            self._warm_model = weakref.ref(model)
        else:
            self._begin(args, state, model)
        if self.only_finds_rate:
            raise _Found(self.rate.search())
        if self.rate.is_due(model):
            with self._timed():
                self.rate.begin(model)
        # Found once: a walk over a large model takes tens of milliseconds, and this is looked at before every step.
        self._still = [] if self.config.train_A else find_lora_layers(model)
        self._dropout.close()  # of a training that was cut off
        if self.config.factor_dropout > 0:
            self._dropout.enter_context(dropped_factors(find_lora_layers(model), self.config.factor_dropout))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        require_still_A(self._still)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._still = []
        self._dropout.close()

    def _begin(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """Give the adapter its start, unless it has one."""
        trainer = self.trainer
        record = self._require_prepared(model)
        require_sound_optimizer(trainer, model)
        if state.global_step == 0 and not record.initialised:
            with self._timed():
                self._start(model, record)
        record.initialised = True
        if args.push_to_hub and trainer.is_world_process_zero():
            # While it trains the Trainer uploads this folder, with the files of a checkpoint that it knows of.
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            write_record(record, args.output_dir)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.start_seconds += time.perf_counter() - begin

    def _start(self, model: nn.Module, record: StartRecord) -> None:
        layers = find_adapted_layers(model)
        trained = {layer.name for layer in layers}
        frozen = [layer for layer in find_lora_layers(model) if layer.name not in trained]
        with warm_heads(self.trainer, self.config) if self._is_cold(model) else nullcontext():
            self.report = start_adapter(self.trainer, self.config, layers, self.probe_dataset, frozen)
        # Before anything is logged: where a tracker raises, the next `train()` goes on from this start.
        record.initialised = True
        self._warm_model = weakref.ref(model)
        started = any(not layer.action.is_plain for layer in self.report.layers)
        publish(self.trainer, self.report, level=logging.INFO if started else logging.WARNING)

    def _is_cold(self, model: nn.Module) -> bool:
        """Tell whether the heads of a model are to be trained first and were not yet."""
        return self.config.head_warmup_steps > 0 and self._warm_model() is not model

    def _require_prepared(self, model: nn.Module) -> StartRecord:
        record = record_of_model(model)
        if record is None and self._evaluates:
            raise ValueError(
                "The trainer was made without a train_dataset, to evaluate, so its adapter was not prepared for a "
                "start. Pass the train_dataset when the trainer is made."
            )
        if record is None:
            raise ValueError(
                "LoRAGACallback: the trainer's model is not the one the callback was made for (a new model of "
                "`model_init`?). Use LoRAGAMixin or LoRAGATrainer, which prepare every new model."
            )
        return record


class _Found(Exception):
    """Leaves `train()` before its first step."""

    def __init__(self, report: RateReport) -> None:
        super().__init__()
        self.report = report


def find_learning_rate(trainer: Trainer) -> RateReport:
    """
    Find a learning rate for a trainer without training: what `LoRAGAConfig(find_learning_rate=True)` would train with.

        report = find_learning_rate(trainer)
        trainer.args.learning_rate = report.learning_rate
        trainer.train()

    Training is begun as far as its first step: the adapter is given its start, unless it has one, and the callbacks'
    `on_train_begin` run. Then everything but the start is what it was. Source: the step that the loss bears, after
    arXiv 2601.16979; how good the rate is was measured, see docs/rates.md.

    Args:
        trainer: a [`LoRAGATrainer`], or one with [`LoRAGAMixin`] or [`LoRAGACallback`].

    Raises:
        `ValueError`: if the trainer has none of these, or if its loss can't tell a rate.
    """
    callbacks = trainer.callback_handler.callbacks
    callback = next((found for found in callbacks if isinstance(found, LoRAGACallback)), None)
    if callback is None:
        raise ValueError(
            f"find_learning_rate: the {type(trainer).__name__} has no LoRAGACallback. Use LoRAGATrainer, or add the "
            "callback with LoRAGAConfig(init='none') for a plain start."
        )
    require_rate_can_be_found(trainer)
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    with attribute(callback, "only_finds_rate", True):
        try:
            trainer.train()
        except _Found as found:
            return found.report
        finally:
            trainer.optimizer, trainer.lr_scheduler, trainer.is_in_train = optimizer, scheduler, False
    raise AssertionError("unreachable")


def _require_no_optimizer(config: LoRAGAConfig) -> None:
    """Refuse what a bare callback has no say in."""
    chosen = config.optimizer
    if chosen.entry.build is not None:
        raise ValueError(
            f"LoRAGACallback: {chosen.setting} is built when the Trainer makes its optimizer, where a callback has no "
            "say. Use LoRAGATrainer or LoRAGAMixin, or pass `optimizers=(LoRAProOptimizer(...), None)` to the Trainer "
            "yourself."
        )


def _require_given_ranks(config: LoRAGAConfig) -> None:
    """Refuse to make another adapter than the trainer's."""
    if config.ranks != "given":
        raise ValueError(
            f"LoRAGACallback: ranks={config.ranks!r} makes the adapter anew, where a callback has no say. Use "
            "LoRAGATrainer with `peft_config`, or plan first: `plan_ranks(trainer).lora_config(lora)`."
        )
