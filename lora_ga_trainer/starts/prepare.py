"""Check an adapter and make room for its start, before an optimizer exists."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import Trainer

from ..adapters.anchor import expand_adapter, halve_adapter
from ..adapters.attention import passed_by_in_eval
from ..adapters.embedding import AdaptedEmbedding
from ..adapters.find import find_adapted_layers, find_lora_layers, is_trained
from ..adapters.host import AdapterHost, require_adapter
from ..adapters.layer import AdaptedLayer
from ..config import LoRAGAConfig
from ..engines.support import require_supported
from ..gradients.probe_file import require_probe_folder
from ..gradients.rollouts import require_repeatable
from ..maths.inits import INITS
from ..saving.fingerprint import fingerprint_base
from ..saving.record import RecordedLoraConfig, StartRecord, attach_record, plain_config, record_of_model


if TYPE_CHECKING:
    from torch.utils.data import Dataset

logger = logging.getLogger(__name__)

# Starts of PEFT that leave B A = 0 with a random A: the only ones that another start may replace.
_PLAIN_INITS = (True, "gaussian")


def require_config(config: Any) -> LoRAGAConfig:
    """
    Return `config`, or the defaults for `None`.

    Raises:
        `TypeError`: for anything else, PEFT's own `LoraGAConfig` included.
    """
    if config is None:
        return LoRAGAConfig()
    if not isinstance(config, LoRAGAConfig):
        kind = f"{type(config).__module__}.{type(config).__name__}"
        raise TypeError(
            f"lora_ga_config is a {kind}. Pass `lora_ga_trainer.LoRAGAConfig`: PEFT's LoraGAConfig belongs to PEFT's "
            "own preprocess_loraga, which this package replaces."
        )
    return config


def prepare_trainer(trainer: Trainer, config: LoRAGAConfig, probe_dataset: Dataset | None = None) -> None:
    """
    Check all of a trainer that a start depends on, then prepare the adapter of its model.

    Raises:
        `ValueError`: naming the engine, the setting, the data set or the adapter that can't be used.
    """
    require_supported(trainer)
    require_probe_folder(config)
    require_repeatable(trainer, config)
    dataset = trainer.train_dataset if probe_dataset is None else probe_dataset
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(
            "The data set that the probe would read is empty (0 examples). Check the filters and the split that made "
            "it."
        )
    prepare_adapter(trainer.model, config, optimizer=trainer.optimizer)


def only_evaluates(trainer: Trainer, probe_dataset: Dataset | None) -> bool:
    """Tell whether there is nothing to train on, so that any adapter will do as it is."""
    own = type(trainer).get_train_dataloader is Trainer.get_train_dataloader
    return trainer.train_dataset is None and probe_dataset is None and own


def prepare_adapter(model: nn.Module, config: LoRAGAConfig, optimizer: torch.optim.Optimizer | None = None) -> None:
    """
    Check that the active adapter can be given a start, and expand it to its anchored form where `config` asks for it.

    An adapter that was prepared or initialised before is left alone, if it was for the same start.

    Args:
        model: with an adapter of LoRA, whichever way it was added.
        config: with an `init` other than `"none"`.
        optimizer: an optimizer that exists already and would hold parameters that expanding replaces.

    Raises:
        `ValueError`: naming the adapter or layer, what is wrong and the way out.
    """
    host = require_adapter(model)
    adapter = host.adapter
    find_adapted_layers(model)  # refuses an adapter of which nothing is trained
    # What is frozen now may be trained later. The adapter is stored in one form, whoever trains it.
    layers = find_lora_layers(model)
    record = record_of_model(model)
    if record is not None:
        _require_same_start(adapter, record, config)
        return
    _require_plain_start(adapter, host.config, layers)
    _require_plain_step(adapter, layers)
    _require_own_factors(layers)
    if INITS[config.init].turns_rows:
        _require_drawn_rows(config, layers)
    if optimizer is not None and config.anchored:
        raise ValueError(
            "An optimizer exists already; it would keep training parameters that an anchored adapter replaces. Pass "
            "`optimizer_cls_and_kwargs=` instead of `optimizers=`, or make the trainer before the optimizer."
        )
    _disown_config(model, host, layers)
    record = StartRecord(
        init=config.init,
        rank=host.config.r,
        anchored=config.anchored,
        base=fingerprint_base(model, layers),
    )
    host.replace_config(attach_record(host.config, record, host))
    _name_passed_by(host.base)
    if record.anchored:
        expand_adapter(model, layers)
        net_decay = config.optimizer.entry.decays_net_update
        logger.info(
            "Adapter %r is anchored: rank %d is stored as %d, `lora_alpha` is scaled to keep s, and weight decay %s.",
            adapter,
            record.rank,
            2 * record.rank,
            "acts on its net update" if net_decay else "leaves its factors alone",
        )


def _name_passed_by(base: nn.Module) -> None:
    """Name in a warning the modules whose evaluation would be that of the base, with plain PEFT, too."""
    names = passed_by_in_eval(base)
    if names:
        logger.warning(
            "In eval mode torch computes nn.TransformerEncoderLayer in one fused call that reads its weights and "
            "passes by the adapters in it, so that what is evaluated is the base: %s. Call "
            "`torch.backends.mha.set_fastpath_enabled(False)` before evaluating.",
            ", ".join(names),
        )


def _disown_config(model: nn.Module, host: AdapterHost, layers: list[AdaptedLayer]) -> None:
    """
    Give an adapter that was made with the config of another one a config of its own.

    `model.add_adapter(name, model.peft_config[other])` makes the two share one object. The config of an anchored
    adapter says rank 2r, so PEFT has made the new one that large. Its user means rank r.
    """
    shared = host.config
    if not isinstance(shared, RecordedLoraConfig) or shared.record is None:
        return
    host.replace_config(copy.deepcopy(plain_config(shared)))
    if shared.record.anchored:
        halve_adapter(model, layers)
        logger.info(
            "Adapter %r was made from the config of adapter %r, which stores rank %d as %d: it has rank %d, too.",
            host.adapter,
            shared.adapter,
            shared.record.rank,
            2 * shared.record.rank,
            shared.record.rank,
        )


def _require_plain_step(adapter: str, layers: list[AdaptedLayer]) -> None:
    """Refuse PEFT's variants whose forward pass is not that of `s B A`: their start would be another one."""
    for layer in layers:
        if layer.variant is not None:
            raise ValueError(
                f"Adapter {adapter!r} is a variant of LoRA, {layer.variant} (layer {layer.name}), whose forward pass "
                "is not `W + s B A`. A gradient-aligned start is defined for plain LoRA and DoRA: leave the variant "
                "out of the LoraConfig, or use LoRAGAConfig(init='none')."
            )


def _require_drawn_rows(config: LoRAGAConfig, layers: list[AdaptedLayer]) -> None:
    """Refuse embeddings, of which PEFT draws `B` and leaves `A` zero: there is no row to turn."""
    for layer in layers:
        if isinstance(layer, AdaptedEmbedding):
            raise ValueError(
                f"Layer {layer.name}: init={config.init!r} turns the rows of A that PEFT draws, and those of an "
                "embedding are zero. Leave it out of `target_modules`, or choose another init."
            )


def _require_own_factors(layers: list[AdaptedLayer]) -> None:
    """Refuse factors that PEFT has made views of another layer's: a start of one would overwrite the other's."""
    owners: dict[int, str] = {}
    for layer in layers:
        for factor in (layer.stored_A, layer.stored_B):
            place = factor.data_ptr()
            owner = owners.setdefault(place, layer.name)
            if place and owner != layer.name:
                raise ValueError(
                    f"Layer {layer.name}: its factors share their memory with those of {owner}, and one start would "
                    "overwrite the other. Use ensure_weight_tying=False in the LoraConfig, or "
                    "LoRAGAConfig(init='none')."
                )


def _require_same_start(adapter: str, record: StartRecord, config: LoRAGAConfig) -> None:
    if record.init != config.init:
        happened = "started with" if record.initialised else "prepared, by a trainer made before, for"
        raise ValueError(
            f"Adapter {adapter!r} was {happened} init={record.init!r}, the config asks for {config.init!r}. Continue "
            f"it with LoRAGAConfig(init={record.init!r}), or make a new adapter."
        )
    if record.anchored != config.anchored and not record.initialised:
        raise ValueError(
            f"Adapter {adapter!r} was prepared, by a trainer made before, for train_A={not config.train_A}, the "
            f"config has train_A={config.train_A}. Use the same here, or make a new adapter."
        )
    if record.initialised:
        logger.info("Adapter %r was initialised before (%s): it continues without a probe.", adapter, record.init)


def _require_plain_start(adapter: str, config: LoraConfig, layers: list[AdaptedLayer]) -> None:
    if config.init_lora_weights not in _PLAIN_INITS:
        raise ValueError(
            f"Adapter {adapter!r} has init_lora_weights={config.init_lora_weights!r}, a start of PEFT's own: two "
            "starts can't be combined. Use init_lora_weights=True in the LoraConfig, or LoRAGAConfig(init='none')."
        )
    for layer in layers:
        if layer.is_anchored:
            raise ValueError(
                f"Layer {layer.name}: the factors are anchored but the adapter's config has lost its record."
            )
        if is_trained(layer):
            raise ValueError(
                f"Adapter {adapter!r} is already trained: at {layer.name} its product B A is not zero, and a new "
                "start would overwrite it. To train it further use LoRAGAConfig(init='none'); an anchored adapter of "
                "this package continues as one after `lora_ga_trainer.load_adapter(base_model, folder)`."
            )
