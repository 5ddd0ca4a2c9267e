"""`write_start`: factors of one's own, in an anchored layer without moving the output, in a plain one by `s B0 A0`."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from lora_ga_trainer import LoRAGACallback, LoRAGAConfig, find_adapted_layers, write_start


@pytest.mark.parametrize("init", ["lora_ga", "lora_one"])
def test_a_start_is_written_as_the_init_of_the_adapter_asks(init: str, tmp_path: Path) -> None:
    base = tiny.llama()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        original = base(input_ids=ids).logits
    weights = {name: module.weight.detach().clone() for name, module in base.named_modules() if "proj" in name}
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=6, target_modules="all-linear"))
    trainer = Trainer(
        model, TrainingArguments(tmp_path, report_to=[], use_cpu=True), train_dataset=[{"input_ids": [0]}]
    )
    LoRAGACallback(trainer, LoRAGAConfig(init=init))
    generator = torch.Generator().manual_seed(0)
    starts = {}
    for layer in find_adapted_layers(model):
        B0, A0 = (torch.randn(n, m, generator=generator) for n, m in ((layer.shape[0], 2), (2, layer.shape[1])))
        write_start(trainer, layer, B0, A0)
        starts[layer.name] = B0, A0
        A, B = layer.stored_A, layer.stored_B
        if init == "lora_ga":  # [A0; 0], [0, B0]
            assert torch.equal(A, torch.cat([A0, torch.zeros_like(A0)]))
            assert torch.equal(B, torch.cat([torch.zeros_like(B0), B0], dim=1))
        else:
            assert torch.equal(A, A0)
            assert torch.equal(B, B0)
    with torch.no_grad():
        after = model(input_ids=ids).logits
        if init == "lora_ga":
            assert torch.equal(after, original)
            return
        moved = tiny.llama()
        for name, module in moved.named_modules():
            if name in starts:
                B0, A0 = starts[name]
                module.weight.copy_(weights[name] + 3 * B0 @ A0)  # s = 6 / 2
        torch.testing.assert_close(after, moved(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
