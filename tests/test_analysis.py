"""What an analysis says of an adapter is what slow fp64 twins say of `W` and `s B A` as whole matrices."""

import json
import re
import warnings
import weakref
from pathlib import Path

import pytest
import reference
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_quantised import BASES, dequantised, quantised

import lora_ga_trainer.analysis.base as base_module
from lora_ga_trainer import AdapterReport, LoRAGAConfig, LoRAGATrainer, analyse_adapter, remove_intruders
from lora_ga_trainer.adapters.find import find_lora_layers
from lora_ga_trainer.maths.intruders import compare_directions, decompose, screen
from lora_ga_trainer.saving.record import FILE_NAME


K, EPS = 6, 0.6
PATTERNS = {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"v_proj": 3}}


def adapted(base, strength=0.3, **changes):
    """Return a model with random factors in place of a training run's, two in three large enough for intruders."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny.with_lora(base, init_lora_weights=False, **changes)
    if getattr(base, "dtype", None) is torch.bfloat16:
        model.bfloat16()  # PEFT makes factors in fp32
    with torch.no_grad():
        for index, layer in enumerate(find_lora_layers(model)):
            layer.stored_B.mul_(strength if index % 3 < 2 else 1e-3)
    return model.eval()


def matrices(model):
    """Return W and s B A of every layer, in fp64."""
    return {
        layer.name: (
            layer.dense_weight().double(),
            layer.s * layer.stored_B.detach().double().flatten(1) @ layer.stored_A.detach().double().flatten(1),
        )
        for layer in find_lora_layers(model)
    }


def load(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, folder).eval()


@pytest.fixture
def folders(tmp_path):
    """Save a model and return it, the folder of its base and that of its adapter."""

    def save(base, **changes):
        shards = changes.pop("max_shard_size", "5GB")
        base.save_pretrained(tmp_path / "base", max_shard_size=shards)
        model = adapted(base, **changes)
        model.save_pretrained(tmp_path / "adapter")
        return model, tmp_path / "base", tmp_path / "adapter"

    return save


def check(report, model):
    """Compare a report with the twins, and return how many intruders there are."""
    weights, count = matrices(model), 0
    assert [layer.name for layer in report.layers] != []
    assert {layer.name for layer in report.layers} == set(weights)
    for layer in report.layers:
        W, D = weights[layer.name]
        values = torch.linalg.svdvals(D)[: len(layer.singular_values)].tolist()
        assert layer.singular_values == pytest.approx(values, rel=1e-6, abs=1e-9)
        assert layer.norm == pytest.approx(D.norm().item(), rel=1e-6)
        assert layer.relative_norm == pytest.approx((D.norm() / W.norm()).item(), rel=1e-6)
        assert (layer.stable_rank, layer.effective_rank) == pytest.approx(
            reference.rank_figures_reference(D), rel=1e-5
        )
        expected = reference.intruder_reference(W, D, report.k, report.eps)
        assert layer.top_values == pytest.approx([s for _, s, *_ in expected], rel=1e-5)
        wanted = {j: (s, c) for j, s, _, _, c in expected if c < report.eps}
        assert {i.index: (i.singular_value, i.similarity) for i in layer.intruders} == {
            j: pytest.approx(pair, rel=1e-4) for j, pair in wanted.items()
        }
        count += len(wanted)
        k = min(report.k, *W.shape)
        U0, _, Vt0 = torch.linalg.svd(W, full_matrices=False)
        outputs, inputs = U0[:, :k], Vt0[:k].T
        assert layer.base_share_out == pytest.approx(reference.share_inside_reference(D, outputs), rel=1e-4)
        assert layer.base_share_in == pytest.approx(reference.share_inside_reference(D.T, inputs), rel=1e-4)
    assert report.intruders == count
    return count


@pytest.mark.parametrize("changes", [{}, PATTERNS, {"use_rslora": True, "lora_alpha": 3}, {"lora_alpha": -8}])
def test_the_figures_are_those_of_the_whole_matrices(changes, folders):
    model, base, adapter = folders(tiny.llama(), **changes)
    report = analyse_adapter(base, adapter, k=K, eps=EPS)
    assert check(report, model) > 0
    assert any(not layer.intruders for layer in report.layers)


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (
            tiny.gpt2,
            {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        ),  # (in, out), some of them square
        (tiny.bert, {"target_modules": ["query", "word_embeddings"]}),
        (tiny.t5, {"target_modules": ["q", "wo", "shared"]}),
    ],
)
def test_conv1d_and_embeddings_are_read_the_right_way_round(base, changes, folders):
    model, folder, adapter = folders(base(), **changes)
    in_memory = analyse_adapter(base(), adapter, k=K, eps=EPS)
    check(in_memory, model)
    check(analyse_adapter(model, adapter, k=K, eps=EPS), model)  # with the adapter in it
    check(analyse_adapter(folder, adapter, k=K, eps=EPS), model)


def test_a_convolution_is_analysed_with_its_kernel_flattened(tmp_path):
    torch.manual_seed(0)
    make = lambda: torch.nn.Sequential(torch.nn.Conv2d(12, 16, 3))
    torch.manual_seed(0)
    base = make()
    save_file(base.state_dict(), tmp_path / "model.safetensors")
    model = adapted(base, target_modules=["0"])
    model.save_pretrained(tmp_path / "adapter")
    for source in (model, tmp_path):
        assert check(analyse_adapter(source, tmp_path / "adapter", k=K, eps=EPS), model) > 0
    remove_intruders(tmp_path, tmp_path / "adapter", tmp_path / "out", k=K, eps=EPS, strength=0.2)
    torch.manual_seed(0)
    found = matrices(load(make(), tmp_path / "out"))["0"]
    W, D = matrices(model)["0"]
    expected = reference.without_intruders_reference(W, D, K, EPS, 0.2)
    torch.testing.assert_close(sum(found), expected, rtol=0, atol=1e-6)


def test_of_a_sharded_base_one_weight_is_held_at_a_time(folders, monkeypatch):
    """The bytes of the base's tensors that are alive together, counted at every read."""
    model, base, adapter = folders(tiny.llama(num_hidden_layers=3), max_shard_size="20KB")
    assert len(list(base.glob("model-*.safetensors"))) > 3
    alive: dict[int, int] = {}
    peak, read = 0, []

    def counting_open(*args, **kwargs):
        opened = real_open(*args, **kwargs)

        class Counting:
            def __enter__(self):
                self.file = opened.__enter__()
                return self

            def __exit__(self, *error):
                return opened.__exit__(*error)

            def __getattr__(self, name):
                return getattr(self.file, name)

            def get_tensor(self, name):
                nonlocal peak
                tensor = self.file.get_tensor(name)
                key, size = id(tensor), tensor.untyped_storage().nbytes()
                alive[key] = size
                weakref.finalize(tensor, alive.pop, key)
                peak = max(peak, sum(alive.values()))
                read.append((name, size))
                return tensor

        return Counting()

    real_open = base_module.safe_open
    monkeypatch.setattr(base_module, "safe_open", counting_open)
    report = analyse_adapter(base, adapter, k=K, eps=EPS)
    assert len(read) == len(report.layers) == 21
    # A name may be bound to the last weight while the next one is read.
    assert peak <= 2 * max(size for _, size in read) < sum(size for _, size in read) / 5
    check(report, model)


def test_the_share_inside_an_anchored_start_is_that_of_its_own_directions(tmp_path):
    """After few steps most of the change lies there: LoRA-GA's first step is `B0 B0^T G + G A0^T A0`, cut to it."""
    model = tiny.with_lora(tiny.llama(), lora_alpha=16)
    trainer = LoRAGATrainer(
        model,
        tiny.arguments(tmp_path / "run", max_steps=3, learning_rate=1e-3),
        train_dataset=tiny.causal_rows(16),
        lora_ga_config=LoRAGAConfig(num_samples=8, probe_file=str(tmp_path / "probe.safetensors"), estimator="exact"),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    report = analyse_adapter(tiny.llama(), tmp_path / "adapter", k=K)
    assert report.directions == "the start"
    layers = {layer.name: layer for layer in find_lora_layers(model)}
    for layer in report.layers:
        A, B = (factor.detach().double() for factor in (layers[layer.name].stored_A, layers[layer.name].stored_B))
        D = layers[layer.name].s * B @ A
        r = layer.rank // 2
        outputs, inputs = torch.linalg.qr(B[:, r:]).Q, torch.linalg.qr((A[:r] - A[r:]).T).Q
        assert layer.start_directions == (r, r) == (4, 4)
        assert layer.start_share_out == pytest.approx(reference.share_inside_reference(D, outputs), rel=1e-5)
        assert layer.start_share_in == pytest.approx(reference.share_inside_reference(D.T, inputs), rel=1e-5)

    with_probe = analyse_adapter(None, tmp_path / "adapter", k=0, probe_file=tmp_path / "probe.safetensors")
    assert with_probe.directions == "the probe's gradient"
    gradients = {name.partition("|")[0]: value for name, value in load_file(tmp_path / "probe.safetensors").items()}
    for layer in with_probe.layers:
        A, B = (factor.detach().double() for factor in (layers[layer.name].stored_A, layers[layer.name].stored_B))
        U, _, Vt = torch.linalg.svd(gradients[layer.name].double(), full_matrices=False)
        m = layer.start_directions[0]
        assert m == layer.rank == 8
        assert layer.start_share_out == pytest.approx(reference.share_inside_reference(B @ A, U[:, :m]), abs=1e-3)
        assert layer.start_share_in == pytest.approx(reference.share_inside_reference((B @ A).T, Vt[:m].T), abs=1e-3)
        assert layer.intruders is layer.base_share_out is layer.top_values is None
    assert "start_share_out" in str(with_probe.metrics())


@pytest.mark.parametrize("kind", ["nf4", "torchao-int8"])
def test_a_quantised_base_is_dequantised_layer_by_layer(kind, tmp_path):
    tiny.llama(hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "base")
    adapted(tiny.llama(hidden_size=64, intermediate_size=96)).save_pretrained(tmp_path / "adapter")
    base = quantised(tmp_path / "base", BASES[kind]())
    report = analyse_adapter(base, tmp_path / "adapter", k=K, eps=EPS)
    changes = matrices(load(tiny.llama(hidden_size=64, intermediate_size=96), tmp_path / "adapter"))
    assert report.intruders > 0
    for layer in report.layers:
        W, D = dequantised(base.get_submodule(layer.name)), changes[layer.name][1]
        expected = [c for *_, c in reference.intruder_reference(W, D, K, EPS) if c < EPS]
        assert [i.similarity for i in layer.intruders] == pytest.approx(expected, rel=1e-4)


# --- the screen


def spectrum(out_features, in_features, values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = min(out_features, in_features)
    U = torch.linalg.qr(torch.randn(out_features, n, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(in_features, n, generator=generator, dtype=torch.float64)).Q
    return (U * values(torch.arange(1, n + 1).double())) @ V.T


@pytest.mark.parametrize("shape", [(150, 220), (220, 150), (160, 160)])
@pytest.mark.parametrize("strength", [1e-3, 0.3, 3.0, 100.0])
def test_the_cheap_way_never_contradicts_the_whole_one(shape, strength):
    """Over bases from steep to flat: what the screen clears has no intruder, and its figures are the right ones."""
    cleared = 0
    for seed, values in enumerate([lambda i: i**-1.0, lambda i: 0.97**i, lambda i: 1 + 0 * i + 1e-3 * i]):
        W = spectrum(*shape, values, seed)
        torch.manual_seed(seed)
        B, A = torch.randn(shape[0], 3).double() / shape[0] ** 0.5, torch.randn(3, shape[1]).double() / shape[1] ** 0.5
        B *= strength
        found = compare_directions(W.float(), B, A, 5, 0.5)
        expected = reference.intruder_reference(W.float(), B @ A, 5, 0.5)
        similarity = torch.tensor([c for *_, c in expected]).double()
        assert torch.equal(found.similarity < 0.5, similarity < 0.5)
        if found.screened:
            cleared += 1
            assert (similarity >= 0.5).all()
            assert (found.similarity <= similarity + 1e-2).all()
            torch.testing.assert_close(found.S, torch.tensor([s for _, s, *_ in expected]).double(), rtol=1e-4, atol=0)
        else:
            torch.testing.assert_close(found.similarity, similarity, rtol=1e-5, atol=1e-5)
    assert cleared >= (1 if strength <= 1e-3 else 0)
    assert cleared <= (0 if strength >= 100 else 3)


def test_a_small_change_of_a_steep_base_is_cleared_without_a_decomposition(monkeypatch):
    W = spectrum(200, 300, lambda i: 0.9**i)
    B, A = torch.randn(200, 4).double() * 1e-4, torch.randn(4, 300).double()
    assert screen(W, B, A, 5, 0.5) is not None
    monkeypatch.setattr("lora_ga_trainer.maths.intruders.decompose", None)
    assert compare_directions(W, B, A, 5, 0.5).screened


def test_directions_that_the_base_lacks_count_as_new():
    """A thin SVD fills a base of low rank up with whatever vectors; those must not hide an intruder."""
    W = torch.zeros(12, 20).double()
    W[0, 0] = 1.0
    B, A = torch.zeros(12, 1).double(), torch.zeros(1, 20).double()
    B[5], A[0, 5] = 2.0, 1.0
    for M, left, right in ((W, B, A), (W.T, A.T, B.T)):
        found = decompose(M, left, right, 2)
        torch.testing.assert_close(found.similarity, torch.tensor([0.0, 1.0]).double())
    assert decompose(
        torch.zeros(4, 5), torch.eye(4, 1).double(), torch.ones(1, 5).double(), 2
    ).similarity.tolist() == [0]


# --- removing them


@pytest.mark.parametrize("changes", [{}, PATTERNS, {"use_rslora": True, "lora_alpha": 3}, {"lora_alpha": -8}])
@pytest.mark.parametrize("strength", [0.0, 0.75])
def test_merged_weights_without_intruders_are_those_of_the_twin(changes, strength, folders, tmp_path):
    model, base, adapter = folders(tiny.llama(), **changes)
    report = remove_intruders(base, adapter, tmp_path / "out", strength=strength, k=K, eps=EPS)
    assert report.intruders > 0
    loaded = load(tiny.llama(), tmp_path / "out")
    ranks = {layer.name: layer.stored_rank for layer in find_lora_layers(loaded)}
    number = {layer.name: len(layer.intruders) for layer in report.layers}
    before = {layer.name: layer for layer in find_lora_layers(model)}
    assert ranks == {name: before[name].stored_rank + number[name] for name in number}
    after = {layer.name: layer for layer in find_lora_layers(loaded)}
    for name in number:
        if not number[name]:
            assert torch.equal(before[name].stored_A, after[name].stored_A)
            assert torch.equal(before[name].stored_B, after[name].stored_B)
    expected = {
        name: reference.without_intruders_reference(W, D, K, EPS, strength) for name, (W, D) in matrices(model).items()
    }
    merged = loaded.merge_and_unload()
    for name, weight in expected.items():
        torch.testing.assert_close(merged.get_submodule(name).weight.double(), weight, rtol=0, atol=1e-6)


def test_in_bf16_the_dtype_stays_and_the_result_is_right_to_its_rounding(folders, tmp_path):
    model, base, adapter = folders(tiny.llama().bfloat16())
    check(analyse_adapter(base, adapter, k=K, eps=EPS), model)
    report = remove_intruders(base, adapter, tmp_path / "out", strength=0.5, k=K, eps=EPS)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    weights = matrices(model)
    for layer in report.layers:
        A, B = (tensors[f"base_model.model.{layer.name}.lora_{x}.weight"].double() for x in "AB")
        W, D = weights[layer.name]
        wanted = reference.without_intruders_reference(W, D, K, EPS, 0.5) - W
        assert (2 * B @ A - wanted).norm() <= 1e-2 * wanted.norm()


def test_a_strength_of_one_copies_the_adapter_to_the_bit(folders, tmp_path):
    _, base, adapter = folders(tiny.llama(), lora_bias=True)
    remove_intruders(base, adapter, tmp_path / "out", strength=1, k=K, eps=EPS)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out"))
    assert set(before) == set(after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_an_anchored_adapter_becomes_a_plain_one_and_heads_are_carried(tmp_path):
    trainer = LoRAGATrainer(
        tiny.with_lora(tiny.bert(), modules_to_save=["classifier"], target_modules=["query", "dense"], lora_alpha=64),
        tiny.arguments(tmp_path / "run", max_steps=6, learning_rate=0.05),
        train_dataset=tiny.class_rows(16),
        lora_ga_config=LoRAGAConfig(num_samples=8),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    report = remove_intruders(tiny.bert(), tmp_path / "adapter", tmp_path / "out", strength=0.5, k=K, eps=EPS)
    assert report.intruders > 0
    assert report.directions == "the start"
    assert not (tmp_path / "out" / FILE_NAME).exists()
    loaded = load(tiny.bert(), tmp_path / "out")
    before = matrices(trainer.model)
    for name, (W, D) in matrices(loaded).items():
        expected = reference.without_intruders_reference(*before[name], K, EPS, 0.5)
        torch.testing.assert_close(W + D, expected, rtol=0, atol=1e-6)
    heads = [m.get_base_model().classifier.modules_to_save["default"].weight for m in (trainer.model, loaded)]
    assert torch.equal(*heads)


# --- the report


def test_the_report_is_written_drawn_and_printed(folders, tmp_path):
    model, base, adapter = folders(tiny.llama())
    report = analyse_adapter(base, adapter, k=K, eps=EPS)
    assert isinstance(report, AdapterReport)
    report.to_json(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["layers"][0]["singular_values"] == report.layers[0].singular_values
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000
    lines = report.table().splitlines()
    assert len(lines) == 1 + len(report.layers)
    assert "start out" not in lines[0]  # a plain adapter tells nothing of its start
    assert f"{report.intruders} intruders" in report.summary()
    metrics = report.metrics()
    whole = sum(D.square().sum() for _, D in matrices(model).values()).sqrt()
    assert metrics["lora_ga/adapter_norm"] == pytest.approx(whole.item(), rel=1e-6)
    assert metrics["lora_ga/adapter_intruders"] == report.intruders
    share = report.layers[0]
    held = sum(i.singular_value**2 for i in share.intruders) / sum(value**2 for value in share.top_values)
    assert share.intruder_share == pytest.approx(held)


def test_layers_are_in_the_order_of_their_numbers(tmp_path):
    tiny.with_lora(tiny.llama(num_hidden_layers=11), target_modules=["q_proj"]).save_pretrained(tmp_path)
    names = [layer.name for layer in analyse_adapter(None, tmp_path, k=0).layers]
    assert names == [f"model.layers.{i}.self_attn.q_proj" for i in range(11)]


def test_an_untrained_adapter_has_no_change_and_no_intruders(tmp_path):
    tiny.with_lora(tiny.llama()).save_pretrained(tmp_path)
    report = analyse_adapter(tiny.llama(), tmp_path)
    assert report.intruders == 0
    assert {(layer.norm, layer.stable_rank, layer.effective_rank) for layer in report.layers} == {(0.0, 0.0, 0.0)}
    assert {layer.base_share_out for layer in report.layers} == {0.0}


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ],
)
def test_what_is_no_change_of_the_weight_is_refused(changes, words, tmp_path):
    tiny.with_lora(tiny.llama(), **changes).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=rf"analyse_adapter: .*{words}.*merge_and_unload"):
        analyse_adapter(tiny.llama(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=rf"remove_intruders: .*{words}.*merge_and_unload"):
        remove_intruders(tiny.llama(), tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fused_experts_are_refused(tmp_path):
    model = tiny.with_lora(tiny.qwen3_moe(), target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"target_parameters=\['mlp.experts.gate_up_proj'\]"):
        analyse_adapter(tiny.qwen3_moe(), tmp_path)


def test_the_attention_of_torch_is_refused_by_name(tmp_path):
    make = lambda: torch.nn.ModuleDict({"attention": torch.nn.MultiheadAttention(16, 2)})
    tiny.with_lora(make(), target_modules=["attention"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Layer attention.*nn.MultiheadAttention"):
        analyse_adapter(make(), tmp_path)


def edit(folder, name, change):
    path = Path(folder) / name
    content = json.loads(path.read_text())
    content.update(change)
    path.write_text(json.dumps(content))


def test_damaged_folders_and_other_bases_are_named(folders, tmp_path):
    _, base, adapter = folders(tiny.llama())
    for source in (tiny.llama(hidden_size=64), tmp_path / "other"):
        if isinstance(source, Path):
            tiny.llama(hidden_size=64).save_pretrained(source)
        with pytest.raises(
            ValueError, match=r"layers.0.mlp.down_proj: .* \(64, 48\), and the adapter is for \(32, 48\)"
        ):
            analyse_adapter(source, adapter)
    with pytest.raises(ValueError, match="BertForSequenceClassification has no such layer"):
        analyse_adapter(tiny.bert(), adapter)
    tiny.bert().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"down_proj: 0 tensors of .*bert can be its weight"):
        analyse_adapter(tmp_path / "bert", adapter)
    with pytest.raises(ValueError, match="no file of safetensors"):
        analyse_adapter(tmp_path / "nothing", adapter)
    edit(adapter, "adapter_config.json", {"r": 5})
    with pytest.raises(ValueError, match=r"down_proj: the file holds .*\(4, 48\).*says rank 5"):
        analyse_adapter(base, adapter)
    edit(adapter, "adapter_config.json", {"r": 4, "alpha_pattern": {"down_proj": "8"}})
    with pytest.raises(ValueError, match=r"down_proj has rank 4 and alpha '8'"):
        analyse_adapter(base, adapter)
    edit(adapter, "adapter_config.json", {"peft_type": "LOHA"})
    with pytest.raises(ValueError, match="of type 'LOHA', not LORA"):
        analyse_adapter(base, adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"adapter_config.json is not the config of an adapter"):
        analyse_adapter(base, adapter)


def test_quantised_files_and_contradictions_are_named(folders):
    _, base, adapter = folders(tiny.llama())
    path = base / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: torch.zeros(512, 1, dtype=torch.uint8)}, path)
    with pytest.raises(ValueError, match=r"q_proj: .* is stored as U8: it is quantised. Pass the model itself"):
        analyse_adapter(base, adapter)
    save_file(tensors, path)
    edit(adapter, "adapter_config.json", {"fan_in_fan_out": True})
    with pytest.raises(ValueError, match=r"fan_in_fan_out=True, which layer .* contradicts"):
        analyse_adapter(base, adapter)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"k": -1}, "k=-1 must be a whole number"),
        ({"k": 2.0}, "k=2.0 must be a whole number"),
        ({"eps": 0}, "eps=0 must be a number above 0"),
        ({"eps": 1.5}, "eps=1.5 must be"),
    ],
)
def test_impossible_settings_are_refused(settings, words, tmp_path):
    with pytest.raises(ValueError, match=re.escape(words)):
        analyse_adapter(tiny.llama(), tmp_path, **settings)


def test_impossible_removals_are_refused(folders):
    _, base, adapter = folders(tiny.llama())
    with pytest.raises(ValueError, match=r"strength=1.2 must be a number from 0 to 1"):
        remove_intruders(base, adapter, "out", strength=1.2)
    with pytest.raises(ValueError, match="is the adapter itself"):
        remove_intruders(base, adapter, adapter / ".." / "adapter")
    with pytest.raises(ValueError, match="k=0 must be a whole number of at least 1"):
        remove_intruders(base, adapter, "out", k=0)
    with pytest.raises(ValueError, match="base=None"):
        analyse_adapter(None, adapter)


def test_a_file_of_a_model_without_its_head_is_found(folders, tmp_path):
    """The names of the files begin deeper in the model than those of the adapter."""
    model, _, adapter = folders(tiny.llama())
    tiny.llama().model.save_pretrained(tmp_path / "inner")
    check(analyse_adapter(tmp_path / "inner", adapter, k=K, eps=EPS), model)
