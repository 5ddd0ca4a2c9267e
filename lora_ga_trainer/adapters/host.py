"""
Hosts: where in a model its adapter is, whoever has put it there.

PEFT adapts a model in two ways. It wraps it (`get_peft_model`), or it changes the layers in place and leaves no
wrapper (`model.add_adapter` of transformers and sentence-transformers, `inject_adapter_in_model`). Both leave a
`peft_config` on some module, at the top of the model or inside it. The rest of the package asks the host of an adapter
and does not ask which way it was.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, set_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in the files of an adapter, as a `PeftModel` spells them


@dataclass(frozen=True)
class AdapterHost:
    """
    The module of a model that holds adapters.

    Args:
        name: of `owner` inside the model, `""` for the model itself.
        owner: holds `peft_config`: a `PeftModel`, a `PeftMixedModel`, a tuner of PEFT, or the module that was adapted
            in place.
    """

    name: str
    owner: nn.Module

    @property
    def base(self) -> nn.Module:
        """The base model, by whose module names layers are called and files are written."""
        if isinstance(self.owner, PeftModel):
            return self.owner.get_base_model()
        if isinstance(self.owner, PeftMixedModel):
            return self.owner.base_model.model
        return self.owner.model if isinstance(self.owner, BaseTuner) else self.owner

    @property
    def configs(self) -> dict[str, Any]:
        """PEFT's own dictionary of configs by adapter; to change an entry changes the adapter's config."""
        return self.owner.peft_config  # type: ignore[return-value]  # torch knows no attribute of a module

    @property
    def adapter(self) -> str:
        """
        The name of the one adapter that is active and would be trained.

        Raises:
            `ValueError`: if several are active at once.
        """
        names = self.active_adapters()
        if len(names) != 1:
            raise ValueError(f"Adapters {names} are active at once. Choose one with `model.set_adapter(name)`.")
        return names[0]

    def active_adapters(self) -> list[str]:
        if isinstance(self.owner, (PeftModel, PeftMixedModel, BaseTuner)):
            return list(self.owner.active_adapters)
        # In place nothing but the layers says what is active. They agree: `set_adapter` visits all of them.
        layers = [module for module in self.owner.modules() if isinstance(module, BaseTunerLayer)]
        return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters if name in self.configs))

    @property
    def config(self) -> LoraConfig:
        """The config of the active adapter."""
        return self.configs[self.adapter]

    def replace_config(self, config: LoraConfig) -> None:
        """Give the active adapter another config object."""
        self.configs[self.adapter] = config

    def let_train(self) -> None:
        """
        Let the active adapter be trained, if it was loaded to be used only.

        Raises:
            `ValueError`: if the adapter trains biases of the base, which only PEFT knows.
        """
        config, adapter = self.config, self.adapter
        if not config.inference_mode:
            return
        if config.bias != "none":
            raise ValueError(
                f"Adapter {adapter!r} has bias={config.bias!r} and was loaded frozen. Load it with "
                "`is_trainable=True`."
            )
        set_adapter(self.owner, adapter)
        config.inference_mode = False

    @property
    def is_trained(self) -> bool:
        """Whether a factor of any adapter requires grad."""
        layers = (module for module in self.owner.modules() if isinstance(module, BaseTunerLayer))
        groups = (getattr(layer, name, None) for layer in layers for name in layer.adapter_layer_names)
        return any(p.requires_grad for group in groups if isinstance(group, nn.Module) for p in group.parameters())

    def place(self, folder: str | os.PathLike[str]) -> Path:
        """Return where the active adapter's files are when the model was saved to `folder`."""
        in_subfolder = isinstance(self.owner, PeftModel) and self.adapter != "default"  # PEFT's rule
        return Path(folder) / self.adapter if in_subfolder else Path(folder)

    def state_dict(self, of_model: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """
        Return the tensors of the active adapter, under the names that PEFT's files have.

        Args:
            of_model: the state of the whole model, where an engine has gathered it already.
        """
        if of_model is not None and self.name:
            inside = f"{self.name}."
            of_model = {k.removeprefix(inside): value for k, value in of_model.items() if k.startswith(inside)}
        tensors = get_peft_model_state_dict(self.owner, state_dict=of_model, adapter_name=self.adapter)
        return {self._prefix + name: value for name, value in tensors.items()}

    @property
    def _prefix(self) -> str:
        """What the names that PEFT gives for `owner` lack of those in its files."""
        if isinstance(self.owner, (PeftModel, PeftMixedModel)):
            return ""
        return PREFIX.removesuffix("model.") if isinstance(self.owner, BaseTuner) else PREFIX

    def save(self, folder: str | os.PathLike[str], of_model: Mapping[str, Tensor] | None = None) -> None:
        """
        Write the active adapter as `PeftModel.save_pretrained` does: `adapter_config.json` and the tensors.

        Args:
            folder: made if it does not exist.
            of_model: see [`state_dict`].
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {
            name: value.detach().cpu().contiguous().clone() for name, value in self.state_dict(of_model).items()
        }
        save_file(tensors, Path(folder) / WEIGHTS_FILE, metadata={"format": "pt"})
        config = self.config
        trains = config.inference_mode
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = self.base.__dict__.get("name_or_path")
        config.inference_mode = True
        try:
            config.save_pretrained(os.fspath(folder))
        finally:
            config.inference_mode = trains

    @torch.no_grad()
    def load(self, folder: str | os.PathLike[str]) -> None:
        """
        Read the tensors of a saved adapter into the active one, in place.

        Raises:
            `ValueError`: naming the folder, if its tensors are not those of the active adapter.
        """
        tensors = load_file(Path(folder) / WEIGHTS_FILE)
        expected = {name: value.shape for name, value in self.state_dict().items()}
        found = {name: value.shape for name, value in tensors.items()}
        differing = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        if differing:
            name = differing[0]
            raise ValueError(
                f"{folder}: {name} is {_shape(found.get(name))} in the file and {_shape(expected.get(name))} in the "
                f"model ({len(differing)} tensors differ). Load it into the LoraConfig and base model that wrote it."
            )
        tensors = {name.removeprefix(self._prefix): value for name, value in tensors.items()}
        set_peft_model_state_dict(self.owner, tensors, adapter_name=self.adapter)


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))


def find_hosts(model: nn.Module) -> list[AdapterHost]:
    """List the outermost modules of a model that hold adapters, the model itself included, in the model's order."""
    hosts: list[AdapterHost] = []
    for name, module in model.named_modules():
        if hosts and (not hosts[-1].name or name.startswith(f"{hosts[-1].name}.")):
            continue  # inside a host: what PEFT wraps holds the configs, too
        # vars: a module that hands attributes of an inner one through is no host.
        if isinstance(module, (PeftModel, PeftMixedModel)) or isinstance(vars(module).get("peft_config"), dict):
            hosts.append(AdapterHost(name, module))
    return hosts


def find_host(model: nn.Module) -> AdapterHost | None:
    """Return the host of the adapter that would be trained; `None` where there is none, or more than one."""
    hosts = find_hosts(model)
    if len(hosts) > 1:
        hosts = [host for host in hosts if host.is_trained]
    return hosts[0] if len(hosts) == 1 else None


def require_adapter(model: nn.Module) -> AdapterHost:
    """
    Return the host of a model's LoRA adapter.

    Raises:
        `ValueError`: if the model has none or several, or if its active adapter is not of LoRA.
    """
    host = find_host(model)
    if host is None:
        raise ValueError(_why_none(model))
    config = host.config
    if not isinstance(config, LoraConfig) or config.peft_type is not PeftType.LORA:
        raise ValueError(
            f"Adapter {host.adapter!r} is of type {config.peft_type}, not LoRA. A gradient-aligned start is defined "
            "for `peft.LoraConfig`; use `LoRAGAConfig(init='none')` or transformers.Trainer for other adapters."
        )
    return host


def _why_none(model: nn.Module) -> str:
    hosts = find_hosts(model)
    if not hosts:
        return (
            f"The model is a {type(model).__name__} without a PEFT adapter. Pass `peft_config=LoraConfig(...)` to the "
            "trainer, wrap the model with `peft.get_peft_model`, or call its `add_adapter` first."
        )
    places = " and ".join(repr(host.name) for host in hosts)
    return (
        f"The {type(model).__name__} holds adapters in {len(hosts)} separate modules ({places}), and one start is "
        "for one adapter. Put a single one over the whole model with `peft.inject_adapter_in_model(config, model)`, "
        "freeze all but one, or use `LoRAGAConfig(init='none')`."
    )


def active_adapter(model: nn.Module) -> str:
    """Return the name of the one adapter of a model that is active and would be trained."""
    return require_adapter(model).adapter
