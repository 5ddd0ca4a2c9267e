"""`lora_ga.json`: what an adapter's folder says of the start it was trained from, and how it gets there."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers.utils import cached_file

from ..adapters.host import AdapterHost, find_host
from ..maths.inits import INITS
from .atomic import whole_file
from .json_file import read_json, short


FILE_NAME = "lora_ga.json"
_FORMAT = 1
_MAX_BYTES = 1 << 20
_OF_RECORD = ("record", "adapter", "saves", "_owner")  # what a RecordedLoraConfig adds
_MAX_RANK = 1 << 20  # no weight has as many rows or columns


@dataclass
class StartRecord:
    """
    The start of one adapter.

    Args:
        init: its name in `INITS`.
        rank: rank r of the factors that learn; an anchored adapter stores 2r.
        anchored: whether the stored factors are in delta form (see `lora_ga_trainer.adapters.anchor`).
        base: fingerprint of the base model that the start was computed on.
        initialised: whether the factors have been written. Only a record of written factors is ever saved.
    """

    init: str
    rank: int
    anchored: bool
    base: str
    initialised: bool = field(default=False)


class RecordedLoraConfig(LoraConfig):
    """
    A `LoraConfig` that writes `lora_ga.json` beside `adapter_config.json`, whoever saves the adapter.

    PEFT calls `save_pretrained` of the config from every path that writes an adapter (checkpoints, `save_model`,
    `push_to_hub`, `model.save_pretrained`), so the record needs no other hook. `adapter_config.json` is that of the
    plain `LoraConfig`.

    A user may hand this very object to `model.add_adapter` for a second adapter, and PEFT derives configs of new
    adapters from it (`add_weighted_adapter`). Neither adapter was started: the record belongs to the adapter that it
    was attached for, and a derived config has none.
    """

    record: StartRecord | None = None
    adapter: str = "default"  # the one that the record tells of
    saves: int = 0  # how often this object was written
    _owner: Callable[[], nn.Module | None] = staticmethod(lambda: None)  # weak: the module holds this config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        self.saves += 1
        if self.record is not None and self.record.initialised and not self._is_of_another(save_directory):
            write_record(self.record, save_directory)

    def _is_of_another(self, folder: str) -> bool:
        """Tell whether a folder is that of another adapter with this same config: PEFT names it after the adapter."""
        owner = self._owner()
        configs: Any = {} if owner is None else owner.peft_config
        sharing = {name for name, config in configs.items() if config is self and name != self.adapter}
        return Path(folder).name in sharing

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the reference to the module, which can't be pickled."""
        return {key: value for key, value in self.__dict__.items() if key != "_owner"}


def attach_record(config: LoraConfig, record: StartRecord, host: AdapterHost | None = None) -> RecordedLoraConfig:
    """
    Return `config` as a `RecordedLoraConfig`; every field, private ones included, is carried over.

    Args:
        config: of the adapter.
        record: of its start.
        host: that holds the adapter as its active one; default an adapter named `"default"`.
    """
    recorded = RecordedLoraConfig.__new__(RecordedLoraConfig)
    recorded.__dict__.update(plain_config(config).__dict__)
    recorded.record = record
    if host is not None:
        recorded.adapter = host.adapter
        recorded._owner = weakref.ref(host.owner)
    return recorded


def plain_config(config: LoraConfig) -> LoraConfig:
    """Return `config` as a plain `LoraConfig`, without a record."""
    plain = LoraConfig.__new__(LoraConfig)
    plain.__dict__.update({key: value for key, value in config.__dict__.items() if key not in _OF_RECORD})
    return plain


def record_of_model(model: nn.Module) -> StartRecord | None:
    """Return the record of a model's active adapter; `None` for a plain adapter or a model without one."""
    config = recorded_config(model)
    return None if config is None else config.record


def recorded_config(model: nn.Module) -> RecordedLoraConfig | None:
    """Return the config of a model's active adapter if it carries the record of that adapter."""
    host = find_host(model)
    if host is None:
        return None
    adapter = host.adapter
    config = host.configs[adapter]
    is_recorded = isinstance(config, RecordedLoraConfig) and config.adapter == adapter and config.record is not None
    return config if is_recorded else None


def write_record(record: StartRecord, folder: str | os.PathLike[str]) -> None:
    """Write `lora_ga.json` into `folder`, whole or not at all."""
    content = {"format": _FORMAT, **asdict(record)}
    del content["initialised"]
    with whole_file(Path(folder) / FILE_NAME) as partial:
        partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_record(folder: str | os.PathLike[str], **hub_kwargs: Any) -> StartRecord | None:
    """
    Read `lora_ga.json` of an adapter's folder or hub repository; `None` where there is none.

    Raises:
        `ValueError`: if the file is there but is not a record of this package.
    """
    path = cached_file(
        os.fspath(folder),
        FILE_NAME,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        **hub_kwargs,
    )
    return None if path is None else _parse_record(Path(path))


def _parse_record(path: Path) -> StartRecord:
    what = "a record of lora_ga_trainer"
    problem = f"{path} is not {what}"
    way_out = "Restore the file, or delete it to continue the adapter as a plain LoRA adapter of its stored rank."
    content = read_json(path, what, way_out, _MAX_BYTES)
    types = {"format": int, "init": str, "rank": int, "anchored": bool, "base": str}
    if not isinstance(content, dict) or set(content) != set(types):
        raise ValueError(f"{problem}: it must hold exactly the keys {sorted(types)}. {way_out}")
    for key, kind in types.items():
        if type(content[key]) is not kind:
            raise ValueError(f"{problem}: {key}={short(content[key])} is not of type {kind.__name__}. {way_out}")
    if content.pop("format") != _FORMAT:
        raise ValueError(f"{problem}: its format is not {_FORMAT}. Use the release of lora_ga_trainer that wrote it.")
    if content["init"] not in INITS or not 1 <= content["rank"] <= _MAX_RANK:
        found = f"init={short(content['init'])}, rank={short(content['rank'])}"
        raise ValueError(f"{problem}: {found} are impossible. {way_out}")
    # The other way round is an adapter whose A is frozen.
    if content["anchored"] and not INITS[content["init"]].anchored:
        raise ValueError(
            f"{problem}: anchored={content['anchored']!r} contradicts init={content['init']!r}. {way_out}"
        )
    return StartRecord(**content, initialised=True)


def require_record(place: Path, expected: StartRecord) -> StartRecord:
    """
    Read the record of an adapter's folder that a run with the start `expected` is to continue.

    Raises:
        `ValueError`: if it is missing or damaged.
    """
    found = read_record(place)
    if found is None:
        raise ValueError(
            f"{place} has no {FILE_NAME}: it was not written by a run with init={expected.init!r}, or the file was "
            "lost, and its factors can't be continued as that start. Resume it with LoRAGAConfig(init='none') on a "
            f"plain adapter of its stored rank, or restore {FILE_NAME} from another checkpoint of the same run."
        )
    return found
