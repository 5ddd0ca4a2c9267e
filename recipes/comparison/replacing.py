"""What adapters that PEFT does not have share: which layers they go on, and what of the model learns."""

from collections.abc import Callable

from peft import LoraConfig, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn

from lora_ga_trainer import find_adapted_layers


def freeze_all_but_heads(model: nn.Module, config: LoraConfig) -> list[str]:
    """
    Freeze `model`, but for the heads that PEFT would train in full.

    Returns:
        The names of the layers that LoRA would adapt. The model is as it was, without an adapter.
    """
    adapted = get_peft_model(model, config)
    names = [layer.name for layer in find_adapted_layers(adapted)]
    inside = adapted.get_base_model().named_modules()
    heads = [name for name, module in inside if isinstance(module, ModulesToSaveWrapper)]
    plain = adapted.unload()
    plain.requires_grad_(False)
    for name in heads:
        plain.get_submodule(name).requires_grad_(True)
    return names


def replace_layers(model: nn.Module, names: list[str], make: Callable[[str, nn.Module], nn.Module]) -> None:
    """Put `make(name, layer)` where each named layer is."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(name, model.get_submodule(name)))
