"""A saved probe is read whole or refused by name, whatever its header claims, and before its tensors are loaded."""

from __future__ import annotations

import json
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hostile import Law, deep, edited_objects, expanded, fuzz, json_texts
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor

from lora_ga_trainer import LoRAGAConfig
from lora_ga_trainer.adapters.find import find_adapted_layers
from lora_ga_trainer.adapters.layer import AdaptedLayer
from lora_ga_trainer.gradients.accumulator import Accumulator, ExactGradient
from lora_ga_trainer.gradients.estimate import GradientEstimate
from lora_ga_trainer.gradients.probe_file import load_estimate, save_estimate
from lora_ga_trainer.gradients.sketch import SketchedGradient, turn


ROWS = tiny.causal_rows(2)
ABSURD = [0, -1, 1, 2**31, 2**40, 2**62, 2**63, 2**64, 10**30, 1.5, "8", None, [4], True]


class Probe:
    """A real file with one exact and one sketched layer, as its header and its bytes."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "probe.safetensors"
        self.config = LoRAGAConfig(num_samples=2, sketch_size=8, probe_file=str(self.path))
        base = tiny.llama(num_hidden_layers=1)
        self.model: PeftModel = tiny.with_lora(base, target_modules=["q_proj", "down_proj"], r=2)
        self.layers: list[AdaptedLayer] = find_adapted_layers(self.model)
        exact, sketch = ExactGradient(self.layers[0].shape), SketchedGradient(self.layers[1].shape, k=8)
        for estimator, layer in zip((exact, sketch), self.layers, strict=True):
            for part in range(2):
                if part == 1 and estimator.sketched:
                    turn([sketch])
                torch.manual_seed(part)
                estimator.add(torch.randn(9, layer.shape[1]), torch.randn(9, layer.shape[0]), 1.0)
        estimators = {layer.name: e for layer, e in zip(self.layers, (exact, sketch), strict=True)}
        estimate = GradientEstimate(estimators, samples=2, items=18.0, tokens=18, loss=3.0)
        save_estimate(estimate, self.config, self.model, self.layers, ROWS)
        content = self.path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        self.header: dict[str, Any] = json.loads(content[8 : 8 + length])
        self.data = content[8 + length :]

    def read(self) -> GradientEstimate:
        found = load_estimate(self.config, self.model, self.layers, ROWS)
        assert found is not None
        return found

    def check(self, found: GradientEstimate) -> None:
        """What was accepted starts an adapter: finite triplets in orthonormal bases."""
        assert set(found.unreached) <= {layer.name for layer in self.layers}
        for layer in self.layers:
            top = found.estimators[layer.name].svd(4)
            assert torch.isfinite(top.S.double()).all()
            for basis in (top.U, top.Vt.T):
                torch.testing.assert_close(basis.T @ basis, torch.eye(4), atol=1e-3, rtol=0)

    def law(self) -> Law:
        return Law(self.path.parent, self.read, self.check, self.path.name)

    def write(self, header: bytes, data: bytes, length: int | None = None) -> None:
        self.path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    return Probe(tmp_path_factory.mktemp("probe"))


@st.composite
def files(draw: st.DrawFn, header: dict[str, Any], data: bytes) -> tuple[bytes, bytes, int | None]:
    """Return header, data and claimed length of the header, with a few things wrong."""
    header, length = json.loads(json.dumps(header)), None
    names = sorted(set(header) - {"__metadata__"})
    for _ in range(draw(st.integers(0, 2))):
        entry = header[draw(st.sampled_from(names))]
        kind = draw(st.sampled_from(["shape", "offset", "dtype", "drop", "rename", "extra", "swap"]))
        if kind == "shape":
            entry["shape"] = draw(st.lists(st.sampled_from([*ABSURD, 8, 32, 48, 24, 64]), max_size=4))
        elif kind == "offset":
            entry["data_offsets"][draw(st.integers(0, 1))] = draw(st.sampled_from(ABSURD))
        elif kind == "dtype":
            entry["dtype"] = draw(st.sampled_from(["F32", "I32", "U32", "F16", "BF16", "F64", "C64", "F8_E4M3", "x"]))
        elif kind == "swap":
            other = header[draw(st.sampled_from(names))]
            entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
        elif kind == "extra":
            header[draw(st.text(max_size=9))] = {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]}
    metadata = header["__metadata__"]
    for key in ("figures", "unreached", "shared"):
        if draw(st.integers(0, 3)) == 0:
            values = edited_objects(json.loads(metadata[key])) if key == "figures" else json_texts()
            metadata[key] = draw(values | json_texts())
    how = draw(st.sampled_from(["", "", "", "", "cut", "length", "bytes", "numbers", "no metadata"]))
    if how == "no metadata":
        header["__metadata__"] = draw(st.sampled_from([{}, None, [], {"figures": 1}, {"figures": None}]))
    text = json.dumps(header).encode()
    if how == "bytes":
        place = draw(st.integers(0, len(text) - 1))
        text = text[:place] + draw(st.binary(max_size=3)) + text[place + 2 :]
    if how == "cut":
        data = data[: draw(st.integers(0, len(data)))]
    if how == "length":
        length = draw(st.sampled_from([0, 1, 7, 2**20, 2**32, 2**63, 2**64 - 1]))
    if how == "numbers":
        place = 4 * draw(st.integers(0, len(data) // 4 - 2))
        odd = [float("nan"), float("inf"), 3e38, -3e38, 1e-45, 0.0]
        data = data[:place] + struct.pack("<f", draw(st.sampled_from(odd))) + data[place + 4 :]
    return text, data, length


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_saved_probe(count: int, probe: Probe) -> None:
    law = probe.law()

    def case(file: tuple[bytes, bytes, int | None]) -> None:
        header, data, length = file
        probe.write(expanded(header), data, length)
        law.holds()

    fuzz(files(probe.header, probe.data), case, count)
    assert min(law.parsed, law.refused) >= count // 50, (law.parsed, law.refused)


def refused_at_once(probe: Probe, message: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=rf"probe\.safetensors.*{message}"):
        probe.read()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert kilobytes < 64 * 1024


def test_a_header_that_claims_a_terabyte_allocates_none_of_it(probe: Probe) -> None:
    """The file is as long as its header says: a hole of a terabyte, which takes no room on the disk."""
    header = json.loads(json.dumps(probe.header))
    name = max(header.keys() - {"__metadata__"}, key=lambda key: header[key]["data_offsets"])
    start = header[name]["data_offsets"][0]
    header[name] = {"dtype": "F32", "shape": [2**19, 2**19], "data_offsets": [start, start + 2**40]}
    text = json.dumps(header).encode()
    try:
        probe.write(text, probe.data)
        with probe.path.open("r+b") as file:
            file.truncate(8 + len(text) + start + 2**40)
        refused_at_once(probe, "damaged")  # by its shape, or already by mmap
    finally:
        probe.path.unlink()


@pytest.mark.parametrize("length", [2**40, 2**63, 2**64 - 1])
def test_a_header_of_an_absurd_length_is_not_read(length: int, probe: Probe) -> None:
    probe.write(json.dumps(probe.header).encode(), probe.data, length)
    refused_at_once(probe, "damaged")


@pytest.mark.parametrize("key", ["figures", "unreached", "shared"])
@pytest.mark.parametrize("text", [deep(100_000), '@[*3@{"a": 1, "a": 2}', "@9*5000@", "[NaN]", ""])
def test_metadata_that_is_no_json_of_ours_is_refused(key: str, text: str, probe: Probe) -> None:
    header = json.loads(json.dumps(probe.header))
    header["__metadata__"][key] = expanded(text.encode()).decode()
    probe.write(json.dumps(header).encode(), probe.data)
    refused_at_once(probe, "damaged")


def ruin(name: str, change: Callable[[Tensor], object]) -> Callable[[Accumulator], object]:
    return lambda sketch: change(getattr(sketch, name))


RUINED = {
    "test columns of zeros": ruin("Omega", lambda Omega: Omega.zero_()),
    "two test columns alike": ruin("Psi", lambda Psi: Psi[:, 0].copy_(Psi[:, 1])),
    "NaN in the last sketch": ruin("Z", lambda Z: Z[-1, -1].fill_(float("nan"))),
    "infinite singular value": ruin("S", lambda S: S[0].fill_(float("inf"))),
}


@pytest.mark.parametrize("change", RUINED.values(), ids=RUINED)
def test_a_sketch_that_cannot_be_recovered_is_refused(change: Callable[[Accumulator], object], tmp_path: Path):
    probe = Probe(tmp_path)
    probe.check(probe.read())
    estimate = probe.read()
    change(estimate.estimators[probe.layers[1].name])
    save_estimate(estimate, probe.config, probe.model, probe.layers, ROWS)
    refused_at_once(probe, "damaged")
