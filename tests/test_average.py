"""An average of adapters is the weighted sum of the whole matrices `s B A`, or its best approximation."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import reference
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer, average_adapters
from lora_ga_trainer.adapters.find import find_lora_layers
from lora_ga_trainer.saving.record import FILE_NAME


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import average_adapters as recipe


# Of different ranks, scalings, targets and dtypes.
KINDS = [
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    {"r": 2, "lora_alpha": -4, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}},
]
KINDS[2]["target_modules"] = "all-linear"
WEIGHTS = [0.5, -0.3, 2.0]


def saved(base, folder, seed, **changes):
    """Save an adapter with random factors and return it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny.with_lora(base, seed=seed, init_lora_weights=False, **changes)
    model.save_pretrained(folder)
    return model.eval()


def load(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT: missing keys
        warnings.filterwarnings("ignore", message=".*merge.*|.*lora_bias.*")
        return PeftModel.from_pretrained(base, folder).eval()


def changes_of(model):
    """Return s B A of every layer, in fp64."""
    return {
        layer.name: layer.s * layer.stored_B.detach().double().flatten(1) @ layer.stored_A.detach().double().flatten(1)
        for layer in find_lora_layers(model)
    }


def summed(models, weights):
    total = {}
    for w, model in zip(weights, models, strict=True):
        for name, change in changes_of(model).items():
            total[name] = total.get(name, 0) + w * change
    return total


@pytest.fixture
def three(tmp_path):
    models = [saved(tiny.llama(), tmp_path / f"{i}", i, **kind) for i, kind in enumerate(KINDS)]
    return models, [tmp_path / f"{i}" for i in range(3)]


def test_at_the_sum_of_ranks_it_is_exact(three, tmp_path):
    models, folders = three
    errors = average_adapters(folders, tmp_path / "out", weights=WEIGHTS)
    loaded = load(tiny.llama(), tmp_path / "out")
    expected = summed(models, WEIGHTS)
    found = changes_of(loaded)
    assert set(found) == set(expected) == set(errors) - {"total"}
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=1e-5, atol=1e-6)
    assert set(errors.values()) == {0.0}
    ranks = {layer.name.rpartition(".")[2]: layer.stored_rank for layer in find_lora_layers(loaded)}
    assert {name: ranks[name] for name in ("q_proj", "v_proj", "down_proj", "k_proj")} == {
        "q_proj": 12,
        "v_proj": 5,
        "down_proj": 6,
        "k_proj": 2,
    }
    assert {layer.s for layer in find_lora_layers(loaded)} == {1.0}
    # What the model computes, not the factors alone.
    batch = torch.stack([row["input_ids"] for row in tiny.causal_rows(3)])
    merged = tiny.llama()
    with torch.no_grad():
        for name, change in expected.items():
            merged.get_submodule(name).weight += change.float()
        torch.testing.assert_close(loaded(batch).logits, merged.eval()(batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 4, 20])
def test_cut_to_a_rank_the_error_is_the_smallest_possible_one_and_told(rank, three, tmp_path):
    """Eckart-Young, of the whole sum: the twin adds up rank-one terms."""
    models, folders = three
    errors = average_adapters(folders, tmp_path / "out", weights=WEIGHTS, rank=rank)
    loaded = load(tiny.llama(), tmp_path / "out")
    assert {layer.stored_rank for layer in find_lora_layers(loaded)} == {rank}
    found, lost, whole = changes_of(loaded), 0.0, 0.0
    for name, change in summed(models, WEIGHTS).items():
        best = reference.best_rank(change, rank)
        torch.testing.assert_close(found[name], best, rtol=1e-4, atol=1e-5)
        missing = (change - best).norm()
        assert errors[name] == pytest.approx((missing / change.norm()).item(), rel=1e-5, abs=1e-7)
        lost, whole = lost + missing**2, whole + change.norm() ** 2
    assert errors["total"] == pytest.approx((lost / whole).sqrt().item(), rel=1e-5, abs=1e-7)
    assert (errors["total"] > 0.01) == (rank < 12)


def test_the_default_is_the_mean_and_one_adapter_is_itself(three, tmp_path):
    models, folders = three
    average_adapters(folders[:2], tmp_path / "mean")
    for name, change in summed(models[:2], [0.5, 0.5]).items():
        torch.testing.assert_close(
            changes_of(load(tiny.llama(), tmp_path / "mean"))[name], change, rtol=1e-5, atol=1e-6
        )
    average_adapters(folders[2:], tmp_path / "one")
    found = changes_of(load(tiny.llama(), tmp_path / "one"))
    for name, change in changes_of(models[2]).items():
        torch.testing.assert_close(found[name], change, rtol=1e-5, atol=1e-6)


def test_anchored_and_plain_adapters_are_averaged_by_their_net_changes(tmp_path):
    models = []
    for init in ("lora_ga", "lora_one", "none"):
        model = tiny.with_lora(tiny.llama(), lora_alpha=16, target_modules=["q_proj", "up_proj"])
        trainer = LoRAGATrainer(
            model,
            tiny.arguments(tmp_path / "run", max_steps=3, learning_rate=0.02),
            train_dataset=tiny.causal_rows(16),
            lora_ga_config=LoRAGAConfig(init=init, num_samples=8),
        )
        trainer.train()
        trainer.save_model(str(tmp_path / init))
        models.append(model)
    folders = [tmp_path / init for init in ("lora_ga", "lora_one", "none")]
    average_adapters(folders, tmp_path / "out")
    assert not (tmp_path / "out" / FILE_NAME).exists()
    loaded = load(tiny.llama(), tmp_path / "out")
    assert {layer.stored_rank for layer in find_lora_layers(loaded)} == {16}  # 8 + 4 + 4
    found = changes_of(loaded)
    for name, change in summed(models, [1 / 3] * 3).items():
        torch.testing.assert_close(found[name], change, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        (tiny.bert, {"target_modules": ["query", "word_embeddings"]}),
        (tiny.gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        (lambda: torch.nn.Sequential(torch.nn.Conv2d(5, 6, 3)), {"target_modules": ["0"]}),
    ],
)
@pytest.mark.parametrize("rank", [None, 3])
def test_embeddings_conv1d_and_convolutions(base, settings, rank, tmp_path):
    torch.manual_seed(0)
    models = [saved(base(), tmp_path / f"{i}", i, r=2 + i, **settings) for i in range(2)]
    average_adapters([tmp_path / "0", tmp_path / "1"], tmp_path / "out", weights=[1, 2], rank=rank)
    found = changes_of(load(base(), tmp_path / "out"))
    for name, change in summed(models, [1, 2]).items():
        expected = change if rank is None else reference.best_rank(change, rank)
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


def test_biases_of_the_factors_are_scaled_as_the_products_are(tmp_path):
    kinds = [{"lora_alpha": 8, "lora_bias": True}, {"lora_alpha": 3, "use_rslora": True, "lora_bias": True}]
    models = []
    for i, kind in enumerate(kinds):
        model = saved(tiny.gpt2(), tmp_path / f"{i}", i, target_modules=["c_attn"], fan_in_fan_out=True, **kind)
        with torch.no_grad():
            for layer in find_lora_layers(model):
                torch.nn.init.normal_(layer.lora_bias)
        model.save_pretrained(tmp_path / f"{i}")
        models.append(model)
    average_adapters([tmp_path / "0", tmp_path / "1"], tmp_path / "out", weights=[1, 2])
    loaded = {layer.name: layer for layer in find_lora_layers(load(tiny.gpt2(), tmp_path / "out"))}
    for one, two in zip(*map(find_lora_layers, models), strict=True):
        expected = one.s * one.lora_bias + 2 * two.s * two.lora_bias
        torch.testing.assert_close(loaded[one.name].s * loaded[one.name].lora_bias, expected)


def test_a_layer_without_a_bias_beside_one_with_it_adds_nothing(tmp_path):
    """PEFT gives every layer of the result a bias; with `init_lora_weights=False` it would be a random one."""
    one = saved(tiny.gpt2(), tmp_path / "0", 0, target_modules=["c_attn"], fan_in_fan_out=True, lora_bias=True)
    two = saved(tiny.gpt2(), tmp_path / "1", 1, target_modules=["c_fc"], fan_in_fan_out=True)
    average_adapters([tmp_path / "0", tmp_path / "1"], tmp_path / "out", weights=[1, 1])
    loaded = load(tiny.gpt2(), tmp_path / "out")
    with_bias = {layer.name: layer for layer in find_lora_layers(one)}
    assert len(find_lora_layers(loaded)) == len(with_bias) + len(find_lora_layers(two))
    for layer in find_lora_layers(loaded):
        source = with_bias.get(layer.name)
        expected = 0 * layer.lora_bias if source is None else source.s * source.lora_bias
        torch.testing.assert_close(layer.s * layer.lora_bias, expected)


def test_the_widest_dtype_is_kept(three, tmp_path):
    _, folders = three
    path = folders[0] / "adapter_model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path)
    average_adapters(folders[:1], tmp_path / "narrow")
    average_adapters(folders[:2], tmp_path / "wide")
    kinds = [
        {value.dtype for value in load_file(tmp_path / name / "adapter_model.safetensors").values()}
        for name in ("narrow", "wide")
    ]
    # Layers that only the bf16 adapter has stay as they are.
    assert kinds == [{torch.bfloat16}, {torch.bfloat16, torch.float32}]


def test_no_product_is_formed(three, tmp_path, monkeypatch):
    """The largest matrix that is decomposed has as many columns as the ranks add up to."""
    seen = []

    def watch(name):
        real = getattr(torch.linalg, name)

        def watched(matrix, *args, **kwargs):
            seen.append(matrix.shape)
            return real(matrix, *args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, watched)

    watch("qr")
    watch("svd")
    average_adapters(three[1], tmp_path / "out", rank=2)
    assert seen
    assert max(shape[1] for shape in seen) <= 12


# --- what is refused


def edit(folder, change):
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_heads_that_differ_are_refused_and_equal_ones_carried(tmp_path):
    settings = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
    models = [saved(tiny.bert(), tmp_path / f"{i}", i, **settings) for i in range(2)]
    average_adapters([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    head = load(tiny.bert(), tmp_path / "out").get_base_model().classifier.modules_to_save["default"].weight
    assert torch.equal(head, models[0].get_base_model().classifier.modules_to_save["default"].weight)
    with torch.no_grad():
        models[1].get_base_model().classifier.modules_to_save["default"].weight += 1
    models[1].save_pretrained(tmp_path / "1")
    with pytest.raises(ValueError, match=r"classifier.weight is not the same in .*0 and .*1"):
        average_adapters([tmp_path / "0", tmp_path / "1"], tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_adapters_of_different_bases_are_refused(three, tmp_path):
    _, folders = three
    edit(folders[0], {"base_model_name_or_path": "this"})
    edit(folders[1], {"base_model_name_or_path": "that"})
    with pytest.raises(ValueError, match=r"trained on 'this' and .* on 'that'"):
        average_adapters(folders[:2], tmp_path / "out")
    saved(tiny.llama(hidden_size=64), tmp_path / "wide", 1, **KINDS[0])
    edit(tmp_path / "wide", {"base_model_name_or_path": "this"})
    with pytest.raises(ValueError, match=r"q_proj has the shapes \[\(32, 32\), \(64, 64\)\]|different bases"):
        average_adapters([folders[0], tmp_path / "wide"], tmp_path / "out")


def record(folder, base):
    content = {"format": 1, "init": "lora_one", "rank": 4, "anchored": False, "base": base}
    (folder / FILE_NAME).write_text(json.dumps(content))


def test_fingerprints_count_more_than_names(tmp_path):
    folders = [tmp_path / "0", tmp_path / "1"]
    for i, folder in enumerate(folders):
        saved(tiny.llama(), folder, i, **KINDS[0])
        edit(folder, {"base_model_name_or_path": f"name {i}"})
        record(folder, "f" * 32)
    average_adapters(folders, tmp_path / "out")  # one base under two names
    record(folders[1], "e" * 32)
    for folder in folders:
        edit(folder, {"base_model_name_or_path": "name"})
    with pytest.raises(ValueError, match="with other weights"):
        average_adapters(folders, tmp_path / "out")


@pytest.mark.parametrize(
    ("make", "changes", "words"),
    [
        (tiny.llama, {"use_dora": True}, "use_dora=True"),
        (tiny.llama, {"init_lora_weights": "pissa"}, "pissa"),
        (tiny.qwen3_moe, {"target_modules": [], "target_parameters": ["experts.down_proj"]}, "target_parameters"),
    ],
)
def test_what_is_no_change_of_a_linear_layer_is_refused(make, changes, words, tmp_path):
    tiny.with_lora(make(), **changes).save_pretrained(tmp_path / "0")
    with pytest.raises(ValueError, match=f"average_adapters: .*{words}"):
        average_adapters([tmp_path / "0"], tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weights": [1.0]}, r"weights=\[1.0\] must be 3 finite numbers"),
        ({"weights": [1, float("nan"), 1]}, "must be 3 finite numbers"),
        ({"rank": 0}, "rank=0 must be a whole number"),
        ({"rank": 2.0}, "rank=2.0 must be a whole number"),
    ],
)
def test_impossible_arguments_are_refused(arguments, words, three, tmp_path):
    with pytest.raises(ValueError, match=words):
        average_adapters(three[1], tmp_path / "out", **arguments)


def test_folders_that_can_not_be_are_refused(three, tmp_path):
    folders = three[1]
    for wrong in ([], str(folders[0])):
        with pytest.raises(ValueError, match="must be a list of folders"):
            average_adapters(wrong, tmp_path / "out")
    with pytest.raises(ValueError, match="is one of the folders"):
        average_adapters(folders, folders[1])
    with pytest.raises(ValueError, match=r"adapter_config\.json is not the config of an adapter"):
        average_adapters([tmp_path / "nothing"], tmp_path / "out")


# --- the program


def test_the_program_writes_what_the_function_does_and_says_its_errors(three, tmp_path, capsys):
    _, folders = three
    output = tmp_path / "program"
    found = recipe.main([*map(str, folders), "--output", str(output), "--rank", "3", "--weights", "0.5", "-1", "2"])
    expected = average_adapters(folders, tmp_path / "function", rank=3, weights=[0.5, -1.0, 2.0])
    assert found == expected
    tensors, others = (load_file(place / "adapter_model.safetensors") for place in (output, tmp_path / "function"))
    assert all(torch.equal(value, others[name]) for name, value in tensors.items())
    assert (output / "average_error.png").is_file()
    header, *lines, total = capsys.readouterr().out.splitlines()
    assert header.split() == ["layer", "error"]
    layers = {name: error for name, error in expected.items() if name != "total"}
    assert [line.split()[0] for line in lines] == sorted(layers, key=lambda name: -layers[name])
    assert all(float(line.split()[1]) == pytest.approx(layers[line.split()[0]], abs=5e-4) for line in lines)
    assert f"all {len(layers)} layers together {expected['total']:.3f}; adapter saved to {output}" in total
