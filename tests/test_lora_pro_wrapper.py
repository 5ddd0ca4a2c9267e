"""The wrapper steps with corrected gradients and is otherwise its inner optimizer."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn

from lora_ga_trainer import LoRAGAConfig, LoRAProAdamW, LoRAProOptimizer, correct_gradients
from lora_ga_trainer.adapters.find import find_adapted_layers
from lora_ga_trainer.starts.prepare import prepare_adapter


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def shake(model, seed=0):
    """Give B (and everything else that is trained) a value, so that no factor is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainable(model):
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return model


def batch(rows=None):
    rows = rows or tiny.causal_rows(6)
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


def backward(model, rows=None):
    loss = model(**batch(rows)).loss
    loss.backward()
    return loss


def llama(seed=0, **lora):
    return shake(tiny.with_lora(tiny.llama(seed), **lora), seed)


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def corrected_by_hand(model):
    """What each pair's gradient must be, one layer at a time."""
    found = {}
    for layer in find_adapted_layers(model):
        A, B = layer.lora_A.weight, layer.lora_B.weight
        found[A], found[B] = correct_gradients(A.detach(), B.detach(), A.grad, B.grad, layer.s)
    return found


PATTERNS = {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"v_proj": 3}}
MODELS = {
    "llama": lambda: llama(),
    "rsLoRA": lambda: llama(use_rslora=True),
    "patterns": lambda: llama(**PATTERNS),
    "DoRA": lambda: llama(use_dora=True),
    "Conv1D": lambda: shake(tiny.with_lora(tiny.gpt2(), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "head": lambda: shake(tiny.with_lora(tiny.bert(), task_type="SEQ_CLS")),
    "bias": lambda: llama(lora_bias=True),
}


def rows_for(name):
    return tiny.class_rows(6) if name == "head" else None


@pytest.mark.parametrize("name", MODELS)
def test_sgd_steps_by_the_corrected_gradient_of_every_pair_and_the_plain_one_of_the_rest(name):
    """Also: the gradients are what they were afterwards."""
    model = MODELS[name]()
    optimizer = LoRAProOptimizer(torch.optim.SGD(trainable(model), lr=0.5), model)
    backward(model, rows_for(name))
    expected = {p: p.detach() - 0.5 * p.grad for p in trainable(model) if p.grad is not None}
    expected |= {p: p.detach() - 0.5 * g for p, g in corrected_by_hand(model).items()}
    raw = {p: p.grad.clone() for p in expected}
    optimizer.step()
    for p, value in expected.items():
        torch.testing.assert_close(p.detach(), value, rtol=1e-3, atol=1e-4 * value.abs().max().item())
        assert torch.equal(p.grad, raw[p])


def test_from_the_plain_start_adams_second_moment_of_A_is_not_left_huge():
    """From `B = 0` under Adam `A` moves as without the correction: no first steps are so long that they freeze it."""
    moved = {}
    for corrected in (False, True):
        model = tiny.with_lora(tiny.llama())
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
        if corrected:
            optimizer = LoRAProOptimizer(optimizer, model)
        layers = find_adapted_layers(model)
        starts = [layer.lora_A.weight.detach().clone() for layer in layers]
        for step in range(60):
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 10)
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
        changes = [(layer.lora_A.weight - A).norm().item() for layer, A in zip(layers, starts, strict=True)]
        moved[corrected] = sum(changes)
    assert moved[True] == pytest.approx(moved[False], rel=0.25)


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_the_floor_is_that_of_the_correction(floor):
    model = tiny.with_lora(tiny.llama())
    layer = find_adapted_layers(model)[0]
    with torch.no_grad():
        layer.lora_B.weight.fill_(1e-3)
    optimizer = LoRAProOptimizer(torch.optim.SGD(trainable(model), lr=0.5), model, floor=floor)
    backward(model)
    A, B = layer.lora_A.weight, layer.lora_B.weight
    before = A.detach().clone()
    dA, _ = correct_gradients(before, B.detach(), A.grad, B.grad, layer.s, floor)
    optimizer.step()
    torch.testing.assert_close(A.detach(), before - 0.5 * dA, rtol=1e-4, atol=1e-6 * dA.abs().max().item())


@pytest.mark.parametrize("floor", [-1.0, float("nan"), float("inf")])
def test_a_floor_out_of_range_is_refused(floor):
    model = llama()
    for build in (
        lambda: LoRAProOptimizer(torch.optim.SGD(trainable(model), lr=0.5), model, floor=floor),
        lambda: LoRAProAdamW(trainable(model), model, floor=floor),
    ):
        with pytest.raises(ValueError, match=f"floor={floor} must be a finite number of at least 0"):
            build()


def test_the_number_of_launches_does_not_grow_with_the_layers():
    counts = []
    for layers in (2, 6):
        model = shake(tiny.with_lora(tiny.llama(num_hidden_layers=layers)))
        optimizer = LoRAProOptimizer(torch.optim.SGD(trainable(model), lr=0.0), model)
        backward(model)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer._corrections()
        working = ("aten::bmm", "aten::mm", "aten::_linalg_eigh", "aten::cat", "aten::mul", "aten::copy_", "aten::add")
        counts.append({e.key: e.count for e in profile.key_averages() if e.key in working})
    assert counts[0] == counts[1]
    assert counts[0]["aten::_linalg_eigh"] == 1


INNERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@pytest.mark.parametrize("name", INNERS)
def test_a_state_dict_continues_bitwise_and_is_the_inner_optimizers(name):
    whole = llama()
    first = LoRAProOptimizer(INNERS[name](trainable(whole)), whole)
    half = None
    for i in range(4):
        if i == 2:
            half = copy.deepcopy(whole), copy.deepcopy(first.state_dict())
        first.zero_grad()
        backward(whole)
        first.step()
    model, state = half
    second = LoRAProOptimizer(INNERS[name](trainable(model)), model)
    second.load_state_dict(state)
    for _ in range(2):
        second.zero_grad()
        backward(model)
        second.step()
    assert same(values(whole), values(model))
    plain = INNERS[name](trainable(model))
    plain.load_state_dict(state)
    keys = {key for entry in state["state"].values() for key in entry}
    assert keys == {key for entry in plain.state.values() for key in entry}


def test_schedule_free_and_its_modes():
    schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    model = llama()
    optimizer = LoRAProOptimizer(schedulefree.AdamWScheduleFree(trainable(model), lr=1e-2), model)
    optimizer.train()
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(backward(model).item())
        optimizer.step()
    at_train = values(model)
    optimizer.eval()
    assert not same(at_train, values(model))
    assert losses[-1] < losses[0]


def test_eight_bit_states():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = llama()
    optimizer = LoRAProOptimizer(bitsandbytes.optim.AdamW8bit(trainable(model), lr=1e-2, min_8bit_size=16), model)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(backward(model).item())
        optimizer.step()
    assert losses[-1] < losses[0]


def test_it_is_an_optimizer_to_schedulers_hooks_and_pickle():
    model = llama()
    optimizer = LoRAProOptimizer(torch.optim.AdamW(trainable(model), lr=1.0), model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-3 / (1 + step))
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda o, state: state | {"mark": 1})
    backward(model)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == optimizer.inner.param_groups[0]["lr"] == 5e-4
    assert seen == ["before", "after"]
    assert optimizer.state is optimizer.inner.state
    assert optimizer.defaults is optimizer.inner.defaults
    assert optimizer.state_dict()["mark"] == 1
    assert copy.deepcopy(optimizer).param_groups[0]["lr"] == 5e-4
    optimizer.zero_grad()
    assert all(p.grad is None for p in trainable(model))


def test_a_closure_is_called_once_and_its_gradients_are_corrected():
    one, two = llama(), llama()
    left = LoRAProOptimizer(torch.optim.SGD(trainable(one), lr=0.1), one)
    right = LoRAProOptimizer(torch.optim.SGD(trainable(two), lr=0.1), two)
    calls = []

    def closure():
        left.zero_grad()
        calls.append(1)
        return backward(one)

    loss = left.step(closure)
    assert loss.item() == backward(two).item()
    right.step()
    assert len(calls) == 1
    assert same(values(one), values(two))


def test_the_scaler_unscales_before_the_correction_and_skips_an_overflow():
    """A scale of a power of two is exact, so the scaled run is the plain one to the bit."""
    one, two = llama(), llama()
    plain = LoRAProOptimizer(torch.optim.SGD(trainable(one), lr=0.1), one)
    scaled = LoRAProOptimizer(torch.optim.SGD(trainable(two), lr=0.1), two)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    backward(one)
    plain.step()
    scaler.scale(two(**batch()).loss).backward()
    scaler.step(scaled)
    scaler.update()
    for left, right in zip(trainable(one), trainable(two), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    before = values(two)
    trainable(two)[0].grad[0, 0] = float("inf")
    scaler._per_optimizer_states.clear()
    scaler.step(scaled)
    scaler.update()
    assert same(before, values(two))


def test_accelerate():
    from accelerate import Accelerator

    model = llama()
    accelerator = Accelerator(cpu=True)
    optimizer = LoRAProOptimizer(torch.optim.AdamW(trainable(model), lr=1e-2), model)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(4):
        loss = model(**batch()).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_two_adapters_are_both_corrected():
    from peft import LoraConfig

    model = llama()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    optimizer = LoRAProOptimizer(torch.optim.SGD(parameters, lr=0.5), model)
    assert {pair.adapter for pair in optimizer.pairs} == {"default", "second"}
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        shake(model)
        optimizer.zero_grad()
        backward(model)
        expected = {p: p.detach() - 0.5 * g for p, g in corrected_by_hand(model).items()}
        resting = {name: p.detach().clone() for name, p in model.named_parameters() if adapter not in name}
        optimizer.step()
        for p, value in expected.items():
            torch.testing.assert_close(p.detach(), value, rtol=1e-3, atol=1e-4 * value.abs().max().item())
        assert all(torch.equal(p, resting[name]) for name, p in model.named_parameters() if name in resting)


def anchored(seed=3):
    """An anchored fp64 adapter at a random start, and the same LoRA-GA on a changed base."""
    plain = tiny.with_lora(tiny.llama().double(), r=3)
    delta = copy.deepcopy(plain)
    prepare_adapter(delta, LoRAGAConfig())
    generator = torch.Generator().manual_seed(seed)
    for ours, theirs in zip(find_adapted_layers(delta), find_adapted_layers(plain), strict=True):
        A0 = torch.randn(theirs.lora_A.weight.shape, generator=generator, dtype=torch.float64)
        B0 = torch.randn(theirs.lora_B.weight.shape, generator=generator, dtype=torch.float64)
        tiny.write_start(ours, B0, A0)
        with torch.no_grad():
            theirs.lora_A.weight.copy_(A0)
            theirs.lora_B.weight.copy_(B0)
            theirs.base.weight.sub_(theirs.s * B0 @ A0)
    return delta, plain


@pytest.mark.parametrize("name", ["SGD momentum", "AdamW", "fused"])
def test_an_anchored_adapter_is_lora_ga_on_a_changed_base(name):
    """
    Five steps: Llama's norms compute in fp32, and the run amplifies their rounding whatever the form.

    Measured with AdamW: after 20 steps the two forms are 5e-2 apart, and the changed base is 2e-2 apart from itself
    started 1e-15 away. The next test walks 50 steps on a model that is fp64 throughout.
    """
    delta, plain = anchored()
    for model in (delta, plain):
        optimizer = INNERS[name](trainable(model))
        optimizer.param_groups[0]["weight_decay"] = 0.0
        optimizer = LoRAProOptimizer(optimizer, model)
        B0 = [layer.lora_B.weight[:, 3:].clone() for layer in find_adapted_layers(model)]
        A0 = [layer.lora_A.weight[:3].clone() for layer in find_adapted_layers(model)]
        for _ in range(5):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
        for layer, start_B, start_A in zip(find_adapted_layers(model), B0, A0, strict=True):
            if layer.is_anchored:
                A, AmA0 = layer.lora_A.weight.chunk(2)
                torch.testing.assert_close(A - start_A, AmA0, rtol=0, atol=1e-13)
                assert torch.equal(layer.lora_B.weight[:, 3:], start_B), "B0 must stay frozen"
    rows = batch()
    torch.testing.assert_close(delta(**rows).logits, plain(**rows).logits, rtol=1e-9, atol=1e-9)


def test_an_anchored_adapter_is_lora_ga_on_a_changed_base_for_50_steps_in_fp64():
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(9, 12), torch.nn.Tanh(), torch.nn.Linear(12, 7)).double()
    plain = tiny.with_lora(base, r=3, target_modules=["0", "2"]).double()
    delta = copy.deepcopy(plain)
    prepare_adapter(delta, LoRAGAConfig())
    for ours, theirs in zip(find_adapted_layers(delta), find_adapted_layers(plain), strict=True):
        A0 = torch.randn(theirs.lora_A.weight.shape, dtype=torch.float64)
        B0 = torch.randn(theirs.lora_B.weight.shape, dtype=torch.float64)
        tiny.write_start(ours, B0, A0)
        with torch.no_grad():
            theirs.lora_A.weight.copy_(A0)
            theirs.lora_B.weight.copy_(B0)
            theirs.base.weight.sub_(theirs.s * B0 @ A0)
    x, y = torch.randn(20, 9, dtype=torch.float64), torch.randn(20, 7, dtype=torch.float64)
    start = delta(x).detach()
    for model in (delta, plain):
        optimizer = LoRAProOptimizer(torch.optim.AdamW(trainable(model), lr=1e-3, weight_decay=0.0), model)
        for _ in range(50):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
    moved = (delta(x) - start).norm()
    assert moved > 0.01 * start.norm(), "the test must move the model"
    assert (delta(x) - plain(x)).norm() < 1e-9 * moved


def test_a_pair_without_a_gradient_is_left_to_the_inner_optimizer():
    model = llama()
    optimizer = LoRAProOptimizer(torch.optim.SGD(trainable(model), lr=0.5), model)
    backward(model)
    first = find_adapted_layers(model)[0]
    first.lora_A.weight.grad = None
    before = first.lora_A.weight.detach().clone()
    expected = first.lora_B.weight.detach() - 0.5 * first.lora_B.weight.grad
    optimizer.step()
    assert torch.equal(first.lora_A.weight, before)
    assert torch.equal(first.lora_B.weight, expected)
    optimizer.zero_grad()
    optimizer.step()  # nothing to do


def test_gradients_that_are_not_finite_are_passed_on_or_refused():
    model = llama()
    layers = find_adapted_layers(model)
    backward(model)
    layers[1].lora_B.weight.grad[0, 0] = float("nan")
    strict = LoRAProOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model, error_if_nonfinite=True)
    before = values(model)
    with pytest.raises(RuntimeError, match=rf"{layers[1].name}, adapter 'default', is not finite"):
        strict.step()
    assert same(before, values(model))
    LoRAProOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model).step()
    broken = [layer.name for layer in layers if not layer.lora_B.weight.isfinite().all()]
    assert broken == [layers[1].name]
    model.zero_grad()
    LoRAProOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model).step()


def test_gradients_are_given_back_when_the_step_fails():
    model = llama()
    inner = torch.optim.SGD(trainable(model), lr=0.1)
    optimizer = LoRAProOptimizer(inner, model)
    backward(model)
    raw = {p: p.grad for p in trainable(model)}

    def fail():
        raise OSError("disk")

    inner.step = fail
    with pytest.raises(OSError, match="disk"):
        optimizer.step()
    assert all(p.grad is raw[p] for p in raw)


def without_pair():
    return LoRAProOptimizer(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), llama())


def only_one_factor():
    model = llama()
    return LoRAProOptimizer(torch.optim.SGD([p for n, p in model.named_parameters() if "lora_B" in n], lr=0.1), model)


def two_groups():
    model = llama()
    groups = [{"params": [p for n, p in model.named_parameters() if f"lora_{x}" in n]} for x in "AB"]
    groups[1]["lr"] = 1.6
    return LoRAProOptimizer(torch.optim.SGD(groups, lr=0.1), model)


def embedding():
    model = tiny.with_lora(tiny.llama(), target_modules=["embed_tokens", "q_proj"])
    return LoRAProOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model)


def no_scale():
    model = llama(lora_alpha=0)
    return LoRAProOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model)


def twice():
    model = llama()
    inner = LoRAProOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model)
    return LoRAProOptimizer(inner, model)


def closure_needed():
    model = llama()
    return LoRAProOptimizer(torch.optim.LBFGS(trainable(model)), model)


REFUSED = {
    "no pair": (without_pair, ValueError, "holds no pair of LoRA factors"),
    "only B": (only_one_factor, ValueError, r"q_proj, adapter 'default': the optimizer holds lora_B but not lora_A"),
    "two groups": (two_groups, ValueError, r"q_proj, adapter 'default'.*different lr \(0.1, 1.6\)"),
    "embedding": (embedding, ValueError, r"embed_tokens.lora_embedding_A.default of shape \(4, 97\).*target_modules"),
    "alpha 0": (no_scale, ValueError, "scaling is 0"),
    "twice": (twice, ValueError, "Wrap a plain optimizer"),
    "LBFGS": (closure_needed, ValueError, "needs a closure"),
    "no optimizer": (lambda: LoRAProOptimizer(3, llama()), TypeError, "inner is a int"),
}


@pytest.mark.parametrize(("build", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_corrected_is_refused_by_name(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_sparse_gradients_are_refused_by_name():
    model = llama()
    optimizer = LoRAProOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model)
    backward(model)
    layer = find_adapted_layers(model)[0]
    layer.lora_A.weight.grad = layer.lora_A.weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match=rf"lora_A of .*{layer.name}.* is sparse"):
        optimizer.step()


def test_a_group_that_is_added_later_is_corrected_or_not_added():
    model = llama()
    layers = find_adapted_layers(model)
    factors = [p for layer in layers[1:] for p in (layer.lora_A.weight, layer.lora_B.weight)]
    optimizer = LoRAProOptimizer(torch.optim.SGD(factors, lr=0.1), model)
    with pytest.raises(ValueError, match="holds lora_A but not lora_B"):
        optimizer.add_param_group({"params": [layers[0].lora_A.weight]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [layers[0].lora_A.weight, layers[0].lora_B.weight], "lr": 0.2})
    assert len(optimizer.pairs) == len(layers)
