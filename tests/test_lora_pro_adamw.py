"""LoRAProAdamW moves `W + s B A` as AdamW moves `W`, and is an optimizer like any other."""

from __future__ import annotations

import copy
import io

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from reference import lora_pro_adamw_reference
from test_lora_pro import reaching
from test_lora_pro_wrapper import MODELS, anchored, backward, batch, llama, rows_for, same, trainable, values
from torch import nn

from lora_ga_trainer import LoRAProAdamW, LoRAProOptimizer
from lora_ga_trainer.adapters.find import find_adapted_layers


class One(nn.Module):
    def __init__(self, out, in_):
        super().__init__()
        self.layer = nn.Linear(in_, out, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.layer(x)


def one_layer(out, in_, r, alpha=2.0, seed=0, zero=False):
    """A single adapted fp64 layer with random factors; `B` is as long as `A` in every direction, or zero."""
    model = get_peft_model(One(out, in_), LoraConfig(r=r, lora_alpha=alpha, target_modules=["layer"]))
    (layer,) = find_adapted_layers(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (layer.lora_A.weight, layer.lora_B.weight):
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
        B = layer.lora_B.weight
        B.copy_(torch.zeros_like(B) if zero else reaching(layer.lora_A.weight, B))
    return model, layer


def give(layer, G):
    """Set the gradients that autograd would give for `dL/dW = G`."""
    A, B = layer.lora_A.weight, layer.lora_B.weight
    A.grad = layer.s * B.detach().T @ G
    B.grad = layer.s * G @ A.detach().T


def delta(layer):
    return layer.s * (layer.lora_B.weight @ layer.lora_A.weight).detach()


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from([(4, 7), (7, 4), (4, 4), (1, 3)]),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.3]),
    st.integers(1, 4),
)
def test_at_full_rank_a_step_is_adamws_with_a_quadratic_remainder(shape, seed, weight_decay, step):
    """For r = min(out, in): the change of `s B A` minus AdamW's on a weight of that value is `lr^2 s dB dA`."""
    out, in_ = shape
    options = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(out, in_, generator=generator, dtype=torch.float64) for _ in range(step)]
    remainders = []
    for lr in (1e-3, 1e-4):
        model, layer = one_layer(out, in_, min(out, in_), seed=seed)
        W = nn.Parameter(delta(layer))
        before = W.detach().clone()
        ours, theirs = LoRAProAdamW(trainable(model), model, **options), torch.optim.AdamW([W], **options)
        for t, G in enumerate(gradients, start=1):
            for optimizer in (ours, theirs):
                optimizer.param_groups[0]["lr"] = lr if t == step else 0.0
            give(layer, G)
            W.grad = G
            A, B = layer.lora_A.weight.detach().clone(), layer.lora_B.weight.detach().clone()
            ours.step()
            theirs.step()
        moved, target = delta(layer) - before, W.detach() - before
        product = layer.s * (layer.lora_B.weight.detach() - B) @ (layer.lora_A.weight.detach() - A)
        size = max(before.norm().item(), 1.0)
        torch.testing.assert_close(moved - target, product, rtol=1e-3, atol=1e-9 * size)
        remainders.append((moved - target).norm().item())
    assert remainders[1] <= remainders[0] / 90 + 1e-9 * size


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("alpha", [1.5, 12.0])
@pytest.mark.parametrize("zero", [False, True])
def test_it_walks_the_path_of_the_slow_twin(weight_decay, alpha, zero):
    model, layer = one_layer(7, 5, 3, alpha, zero=zero)
    target = torch.randn(7, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    calls = iter(range(40))

    def gradients(A, B):
        if next(calls, None) is None:
            return None
        G = layer.s * B @ A - target
        return layer.s * B.T @ G, layer.s * G @ A.T

    start = layer.lora_A.weight.detach().clone(), layer.lora_B.weight.detach().clone()
    A, B = lora_pro_adamw_reference(*start, gradients, layer.s, **options)
    optimizer = LoRAProAdamW(trainable(model), model, **options)
    for _ in range(40):
        give(layer, delta(layer) - target)
        optimizer.step()
    torch.testing.assert_close(layer.lora_A.weight.detach(), A, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(layer.lora_B.weight.detach(), B, rtol=1e-7, atol=1e-9)


def walk_from_zero(lr, steps, warmup):
    """Take steps towards a target from `B = 0`. Yields the factors before and after each, and the largest rate."""
    model, layer = one_layer(24, 16, 3, zero=True)
    target = torch.randn(24, 16, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    optimizer = LoRAProAdamW(trainable(model), model)
    for t in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, t / warmup)
        before = layer.lora_A.weight.detach().clone(), layer.lora_B.weight.detach().clone()
        give(layer, delta(layer) - target)
        optimizer.step()
        yield before, (layer.lora_A.weight.detach().clone(), layer.lora_B.weight.detach().clone()), layer.s


@pytest.mark.parametrize("warmup", [1, 10])
def test_from_zero_the_change_of_A_goes_to_zero_with_the_rate(warmup):
    """In the first step with `B` other than 0 too, where `dA` of the bare theorem is as long as `1 / rate`."""
    changes = []
    for lr in (1e-3, 1e-4, 1e-9):
        walk = list(walk_from_zero(lr, 4, warmup))
        (A0, _), (_, (A1, _), _) = walk[0][0], walk[-1]
        changes.append(((A1 - A0).norm() / A0.norm()).item())
    assert 0 < changes[1] <= changes[0] / 9
    assert changes[0] < 0.05
    assert changes[2] < 1e-9


def test_from_zero_the_realised_step_is_the_promised_one():
    """The change of `s B A` is that to first order in the steps: `s dB dA` stays small beside it from step one."""
    for (A0, B0), (A1, B1), s in walk_from_zero(1e-3, 30, 10):
        promised = s * (B0 @ (A1 - A0) + (B1 - B0) @ A0)
        assert (s * (B1 @ A1 - B0 @ A0) - promised).norm() <= 0.02 * promised.norm()


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_adapter_trains_and_the_rest_gets_torchs_adamw(name):
    model = MODELS[name]().eval()  # no dropout: the loss must fall
    factors = {id(p) for layer in find_adapted_layers(model) for p in (layer.lora_A.weight, layer.lora_B.weight)}
    others = [p for p in trainable(model) if id(p) not in factors]
    plain = [nn.Parameter(p.detach().clone()) for p in others]
    options = {"lr": 1e-3, "weight_decay": 0.1}
    optimizer = LoRAProAdamW(trainable(model), model, **options)
    torchs = torch.optim.AdamW(plain, **options) if plain else None
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(backward(model, rows_for(name)).item())
        for ours, theirs in zip(others, plain, strict=True):
            theirs.grad = None if ours.grad is None else ours.grad.clone()
        optimizer.step()
        if torchs is not None:
            torchs.step()
    assert losses[-1] < losses[0]
    assert bool(others) == (name in ("DoRA", "head", "bias"))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(others, plain, strict=True))


def test_the_plain_start_learns_from_its_first_step():
    model = tiny.with_lora(tiny.llama())
    optimizer = LoRAProAdamW(trainable(model), model, lr=1e-3)
    before = values(model)
    first = backward(model).item()
    optimizer.step()
    assert backward(model).item() < first
    for name, value in values(model).items():
        assert torch.equal(value, before[name]) == ("lora_A" in name), "B = 0 gives A no step"
    assert {state["step"].item() for state in optimizer.state.values() if "step" in state} == {1.0}


STATES = {
    "fp32": {},
    "bf16": {"state_dtype": torch.bfloat16},
    "offloaded": {"offload_state": True},
    "bf16 offloaded": {"state_dtype": torch.bfloat16, "offload_state": True},
}


def continued(model_of, options, steps=2):
    """Train 2 + 2 in one piece, and 2 after a trip of model and state through a file."""
    whole = model_of()
    first = LoRAProAdamW(trainable(whole), whole, lr=1e-3, weight_decay=0.1, **options)
    file = io.BytesIO()
    for i in range(2 * steps):
        if i == steps:
            torch.save({"model": whole.state_dict(), "optimizer": first.state_dict()}, file)
        first.zero_grad()
        backward(whole)
        first.step()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = model_of()
    model.load_state_dict(saved["model"])
    second = LoRAProAdamW(trainable(model), model, lr=1e-3, weight_decay=0.1, **options)
    second.load_state_dict(saved["optimizer"])
    for _ in range(steps):
        second.zero_grad()
        backward(model)
        second.step()
    return whole, first, model, second


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resume_continues_bitwise(state, dtype):
    """bf16 factors too: their fp32 moments must not be cast to bf16 on loading, as torch would."""

    def model_of():
        return llama(rank_pattern={"q_proj": 2}).to(dtype)

    whole, first, model, second = continued(model_of, STATES[state])
    assert same(values(whole), values(model))
    for one, two in zip(first.state.values(), second.state.values(), strict=True):
        assert one.keys() == two.keys()
        assert all(one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]) for key in one)
    wanted = STATES[state].get("state_dtype", torch.float32)
    assert {state["exp_avg"].dtype for state in first.state.values() if state} == {wanted}


def test_loading_does_not_share_memory_with_the_optimizer_that_was_saved():
    model = llama()
    first = LoRAProAdamW(trainable(model), model, lr=1e-3)
    backward(model)
    first.step()
    second = LoRAProAdamW(trainable(model), model, lr=1e-3)
    second.load_state_dict(first.state_dict())
    key = find_adapted_layers(model)[0].lora_A.weight
    kept = first.state[key]["exp_avg"].clone()
    second.step()
    assert torch.equal(first.state[key]["exp_avg"], kept)


def test_the_state_is_two_buffers_of_the_weights_shape():
    model = llama()
    for dtype, size in ((torch.float32, 8), (torch.bfloat16, 4)):
        optimizer = LoRAProAdamW(trainable(model), model, state_dtype=dtype)
        backward(model)
        optimizer.step()
        entries = sum(layer.shape[0] * layer.shape[1] for layer in find_adapted_layers(model))
        moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq") if state]
        assert sum(m.numel() * m.element_size() for m in moments) == size * entries


def test_bf16_moments_forget_as_fp32_ones_do():
    """Rounded to nearest, a second moment that shrinks by 0.1% a step would never shrink."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, layer = one_layer(6, 6, 6)
        model.float()
        optimizer = LoRAProAdamW(trainable(model), model, lr=0.0, state_dtype=dtype)
        G = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
        for t in range(1500):
            give(layer, G if t < 20 else 0.0 * G)
            optimizer.step()
        found[dtype] = optimizer.state[layer.lora_A.weight]["exp_avg_sq"].float()
    torch.testing.assert_close(found[torch.bfloat16], found[torch.float32], rtol=0.05, atol=0)


def test_bf16_and_fp32_moments_learn_alike():
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = llama()
        optimizer = LoRAProAdamW(trainable(model), model, lr=1e-3, state_dtype=dtype)
        for _ in range(20):
            optimizer.zero_grad()
            losses[dtype] = backward(model).item()
            optimizer.step()
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=5e-3)


def test_the_size_of_a_chunk_changes_nothing(monkeypatch):
    found = []
    for entries in (2**24, 1):
        monkeypatch.setattr("lora_ga_trainer.optimizers.adamw._CHUNK", entries)
        model = llama()
        optimizer = LoRAProAdamW(trainable(model), model, lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
        found.append(values(model))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-5)


def test_the_number_of_launches_does_not_grow_with_the_layers():
    counts = []
    for layers in (2, 6):
        model = llama_of(layers)
        optimizer = LoRAProAdamW(trainable(model), model, lr=1e-3)
        backward(model)
        optimizer.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
        working = (
            "aten::bmm",
            "aten::mm",
            "aten::_linalg_eigh",
            "aten::cat",
            "aten::lerp_",
            "aten::sqrt",
            "aten::div",
        )
        counts.append({e.key: e.count for e in profile.key_averages() if e.key in working})
    assert counts[0] == counts[1]
    assert counts[0]["aten::_linalg_eigh"] == 1


def llama_of(layers):
    from test_lora_pro_wrapper import shake

    return shake(tiny.with_lora(tiny.llama(num_hidden_layers=layers)))


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_an_anchored_adapter_keeps_its_halves_and_matches_a_changed_base(weight_decay):
    """Decay pulls at the net update `s (B A - B0 A0)`: without it the same as LoRA-GA on a changed base."""
    delta_form, plain = anchored()
    for model in (delta_form, plain):
        layers = find_adapted_layers(model)
        starts = [(layer.lora_A.weight[:3].clone(), layer.lora_B.weight[:, 3:].clone()) for layer in layers]
        optimizer = LoRAProAdamW(trainable(model), model, lr=1e-3, weight_decay=weight_decay)
        for _ in range(5):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
        if model is delta_form:
            for layer, (A0, B0) in zip(layers, starts, strict=True):
                A, AmA0 = layer.lora_A.weight.chunk(2)
                torch.testing.assert_close(A - A0, AmA0, rtol=0, atol=1e-13)
                assert torch.equal(layer.lora_B.weight[:, 3:], B0)
    rows = batch()
    near = torch.allclose(delta_form(**rows).logits, plain(**rows).logits, rtol=1e-8, atol=1e-8)
    assert near == (weight_decay == 0.0)


def test_decay_of_an_anchored_adapter_shrinks_the_net_update():
    """With no gradient left the first step of decay lowers `|s (B A - B0 A0)|` in every layer."""
    model, _ = anchored()
    fast = LoRAProOptimizer(torch.optim.SGD(trainable(model), lr=0.5), model)
    for _ in range(3):
        fast.zero_grad()
        backward(model)
        fast.step()
    layers = find_adapted_layers(model)
    before = [delta(layer).norm() for layer in layers]
    optimizer = LoRAProAdamW(trainable(model), model, lr=1e-2, weight_decay=1.0)
    for p in trainable(model):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(delta(layer).norm() < norm for layer, norm in zip(layers, before, strict=True))


def test_a_pair_without_a_gradient_is_skipped_and_counts_its_own_steps():
    model, twin = llama(), llama()
    optimizer = LoRAProAdamW(trainable(model), model, lr=1e-3)
    first, other = find_adapted_layers(model)[0], find_adapted_layers(model)[7]
    assert first.shape == other.shape, "two of one batch"
    for step in range(3):
        optimizer.zero_grad()
        backward(model)
        if step == 1:
            first.lora_A.weight.grad = None
            before = first.lora_A.weight.detach().clone(), first.lora_B.weight.detach().clone()
            moments = optimizer.state[first.lora_A.weight]["exp_avg"].clone()
        optimizer.step()
        if step == 1:
            assert torch.equal(first.lora_A.weight, before[0])
            assert torch.equal(first.lora_B.weight, before[1])
            assert torch.equal(optimizer.state[first.lora_A.weight]["exp_avg"], moments)
    assert optimizer.state[first.lora_A.weight]["step"].item() == 2
    assert optimizer.state[other.lora_A.weight]["step"].item() == 3
    assert not same(values(model), values(twin))


def test_gradients_that_are_not_finite_are_passed_on_or_refused():
    model = llama()
    layers = find_adapted_layers(model)
    backward(model)
    layers[1].lora_A.weight.grad[0, 0] = float("inf")
    strict = LoRAProAdamW(trainable(model), model, error_if_nonfinite=True)
    before = values(model)
    with pytest.raises(RuntimeError, match=rf"{layers[1].name}, adapter 'default', is not finite"):
        strict.step()
    assert same(before, values(model))
    LoRAProAdamW(trainable(model), model).step()
    assert [layer.name for layer in layers if not layer.lora_B.weight.isfinite().all()] == [layers[1].name]


def test_it_is_an_optimizer_to_schedulers_closures_and_the_scaler():
    one, two = llama(), llama()
    plain, scaled = LoRAProAdamW(trainable(one), one, lr=1.0), LoRAProAdamW(trainable(two), two, lr=1.0)
    for optimizer in (plain, scaled):
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(2):

        def closure():
            plain.zero_grad()
            return backward(one)

        plain.step(closure)
        scaled.zero_grad()
        scaler.scale(two(**batch()).loss).backward()
        scaler.step(scaled)
        scaler.update()
    for left, right in zip(trainable(one), trainable(two), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)
    copied = copy.deepcopy(plain)
    assert copied.param_groups[0]["lr"] == plain.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0 must be at least 0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\)"),
        ({"betas": (-0.1, 0.9)}, r"betas=\(-0.1, 0.9\)"),
        ({"eps": -1e-8}, "eps=-1e-08"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"state_dtype": torch.float16}, "state_dtype=torch.float16 is not one of"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    model = llama()
    with pytest.raises(ValueError, match=message):
        LoRAProAdamW(trainable(model), model, **options)


def test_groups_that_part_a_pair_are_refused_unless_their_options_are_equal():
    model = llama()
    sides = [{"params": [p for n, p in model.named_parameters() if f"lora_{x}" in n]} for x in "AB"]
    LoRAProAdamW([dict(side) for side in sides], model)
    sides[1]["weight_decay"] = 0.5
    with pytest.raises(ValueError, match=r"q_proj, adapter 'default'.*different weight_decay"):
        LoRAProAdamW(sides, model)


def test_a_group_that_is_added_later_is_stepped_or_not_added():
    model = llama()
    layers = find_adapted_layers(model)
    factors = [p for layer in layers[1:] for p in (layer.lora_A.weight, layer.lora_B.weight)]
    optimizer = LoRAProAdamW(factors, model)
    with pytest.raises(ValueError, match="holds lora_A but not lora_B"):
        optimizer.add_param_group({"params": [layers[0].lora_A.weight]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [layers[0].lora_A.weight, layers[0].lora_B.weight], "lr": 1e-3})
    before = layers[0].lora_B.weight.detach().clone()
    backward(model)
    optimizer.step()
    assert not torch.equal(layers[0].lora_B.weight, before)


def test_the_state_of_another_optimizer_is_refused():
    model = llama()
    plain = torch.optim.AdamW(trainable(model))
    backward(model)
    plain.step()
    with pytest.raises(ValueError, match=r"exp_avg of .*q_proj.* has shape \(4, 32\).*\(32, 32\)"):
        LoRAProAdamW(trainable(model), model).load_state_dict(plain.state_dict())
