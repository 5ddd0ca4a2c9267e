"""What DeepSpeed leaves out of a checkpoint is found in any adapter. `test_engines.py` runs the engine itself."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, PrefixTuningConfig, VeraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from lora_ga_trainer.saving import untrained
from lora_ga_trainer.saving.untrained import folder_of_untrained, restore_untrained, with_untrained


def trainer_of(model, output_dir="", engine=DistributedType.DEEPSPEED):
    accelerator = SimpleNamespace(distributed_type=engine, unwrap_model=lambda model: model)
    return SimpleNamespace(model=model, accelerator=accelerator, args=SimpleNamespace(output_dir=str(output_dir)))


def lora(**changes):
    return tiny.with_lora(tiny.llama(), **changes)


def freeze(model, part):
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.requires_grad_(False)
    return model


ADAPTERS = {
    "lora": (lora, 0),
    "frozen A": (lambda: freeze(lora(target_modules=["q_proj", "down_proj"]), "lora_A"), 4),
    "frozen B": (lambda: freeze(lora(target_modules=["q_proj"]), "lora_B"), 2),
    "head": (lambda: lora(modules_to_save=["lm_head"]), 0),
    "head and frozen A": (
        lambda: freeze(lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), "lora_A"),
        2,
    ),
    "tokens": (lambda: lora(trainable_token_indices=[1, 2]), 0),
    # Of an adapted embedding PEFT saves the base weight, too.
    "embedding": (lambda: lora(target_modules=["embed_tokens", "q_proj"]), 1),
    "vera": (lambda: get_peft_model(tiny.llama(), VeraConfig(r=2, target_modules=["q_proj"])), 0),
    "prefix": (
        lambda: get_peft_model(tiny.llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        0,
    ),
    "none": (tiny.llama, 0),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_what_is_missing_from_a_saved_state_is_added(case, monkeypatch):
    """Here all that is not trained counts as partitioned, as under ZeRO-3, whose state lacks it."""
    make, count = ADAPTERS[case]
    model = make()
    monkeypatch.setattr(untrained, "is_partitioned", lambda parameter: True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = with_untrained(trainer_of(model), trained)
    added = found.keys() - trained.keys()
    assert len(added) == count
    for name in added:
        assert torch.equal(found[name], model.get_parameter(name))
        assert not model.get_parameter(name).requires_grad
    assert with_untrained(trainer_of(model), None) is None
    assert with_untrained(trainer_of(model, engine=DistributedType.MULTI_CPU), trained) is trained


@pytest.mark.parametrize("case", ADAPTERS)
def test_what_is_not_restored_is_read_from_the_adapter_s_file(case, tmp_path):
    make, count = ADAPTERS[case]
    model = make()
    if case != "none":
        model.save_pretrained(tmp_path)
    with torch.no_grad():
        before = {name: p.clone() for name, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.fill_(torch.nan)
    restore_untrained(trainer_of(model), str(tmp_path))
    restored = [name for name, p in model.named_parameters() if "lora_" in name and not p.isnan().any()]
    assert len(restored) == (0 if case == "embedding" else count)
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in restored)


def test_an_adapter_in_place_is_left_to_deepspeed(tmp_path):
    """Of a model that is no PeftModel transformers lets DeepSpeed save everything."""
    model = freeze(inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), tiny.llama()), "lora_A")
    restore_untrained(trainer_of(model), str(tmp_path))


def test_a_file_that_lacks_a_tensor_is_named(tmp_path):
    model = freeze(lora(target_modules=["q_proj"]), "lora_A")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors can't be read"):
        restore_untrained(trainer_of(model), str(tmp_path))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: torch.ones(1, 3)}, path)
    with pytest.raises(ValueError, match=rf"can't be resumed: .* has no {name} of \(4, 32\)"):
        restore_untrained(trainer_of(model), str(tmp_path))
    path.write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"can't be read"):
        restore_untrained(trainer_of(model), str(tmp_path))


def test_the_folder_is_the_one_that_the_trainer_loads(tmp_path):
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    trainer = trainer_of(None, tmp_path)
    assert folder_of_untrained(trainer, True) == str(tmp_path / "checkpoint-10")
    assert folder_of_untrained(trainer, "elsewhere") == "elsewhere"
    assert folder_of_untrained(trainer, None) is folder_of_untrained(trainer, False) is None
    assert folder_of_untrained(trainer_of(None, tmp_path / "none"), True) is None
    assert folder_of_untrained(trainer_of(None, tmp_path, DistributedType.NO), True) is None
