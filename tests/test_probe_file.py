"""A saved gradient estimate gives the factors of the probe it came from, to the bit, and no other run can read it."""

import json

import datasets
import pytest
import tiny
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer
from lora_ga_trainer.starts.report import Action


CAUSAL = {"target_modules": ["q_proj", "down_proj"], "r": 2, "lora_alpha": 4}
WIDE = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1}
# 128 x 128 is sketched with 8 columns, 32 x 32 is not; what the first pass has kept is written.
SKETCH = {"estimator": "sketch", "sketch_size": 8, "min_energy_kept": None}


class AtFirstStep(TrainerCallback):
    """Notes the weights and the number of losses computed when the start is done and no step is taken yet."""

    def __init__(self):
        self.trainer, self.start, self.losses = None, None, 0

    def watch(self, trainer):
        self.trainer, compute_loss = trainer, trainer.compute_loss

        def counted(*args, **kwargs):
            self.losses += self.start is None
            return compute_loss(*args, **kwargs)

        trainer.compute_loss = counted

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.start is None:
            self.start = {name: tensor.clone() for name, tensor in model.state_dict().items()}


def make_trainer(folder, base=None, lora=None, rows=None, args=None, watch=None, **config):
    settings = {"num_samples": 8, "probe_file": str(folder / "probe.safetensors")} | config
    trainer = LoRAGATrainer(
        tiny.with_lora(tiny.llama() if base is None else base, **(CAUSAL | (lora or {}))),
        tiny.arguments(folder / "run", max_steps=2, **(args or {})),
        train_dataset=tiny.causal_rows(16) if rows is None else rows,
        lora_ga_config=LoRAGAConfig(**settings),
        callbacks=[] if watch is None else [watch],
    )
    if watch is not None:
        watch.watch(trainer)
    return trainer


def run(folder, **changes):
    """Return the trainer of a whole run and what was seen at its first step."""
    seen = AtFirstStep()
    trainer = make_trainer(folder, watch=seen, **changes)
    trainer.train()
    return trainer, seen


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def classifier(**changes):
    lora = {"target_modules": ["query"], "modules_to_save": ["classifier"], "lora_dropout": 0.1}
    return {"base": tiny.bert(), "lora": lora, "rows": tiny.class_rows(16)} | changes


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The bytes of the file that the default run of this module writes."""
    folder = tmp_path_factory.mktemp("written")
    run(folder)
    return (folder / "probe.safetensors").read_bytes()


@pytest.mark.parametrize("init", ["lora_ga", "lora_one"])
@pytest.mark.parametrize("wide", [False, True], ids=["exact", "sketched"])
def test_the_file_gives_the_factors_of_the_probe_to_the_bit(init, wide, tmp_path):
    sizes, config = (WIDE, SKETCH) if wide else ({}, {"estimator": "exact"})
    without, start = run(tmp_path, base=tiny.llama(**sizes), init=init, **(config | {"probe_file": None}))
    _, written = run(tmp_path, base=tiny.llama(**sizes), init=init, **config)
    again, read = run(tmp_path, base=tiny.llama(**sizes), init=init, **config)
    assert {layer.sketched for layer in again.lora_ga_report.layers} == {wide}
    assert same(written.start, start.start)
    assert same(read.start, start.start)
    assert same(again.model.state_dict(), without.model.state_dict())  # the steps after it as well
    assert (start.losses > 0, written.losses > 0, read.losses) == (True, True, 0)


def test_the_report_of_a_read_file_is_that_of_its_probe(tmp_path):
    written, _ = run(tmp_path)
    read, _ = run(tmp_path)
    a, b = written.lora_ga_report, read.lora_ga_report
    assert b.layers == a.layers
    assert (b.samples, b.items, b.tokens) == (a.samples, a.items, a.tokens)
    assert b.loss_before is b.loss_after is None  # no batch is at hand
    assert "loss" not in b.summary()


def test_a_classifiers_probe_is_found_again(tmp_path):
    """BERT's forward writes `problem_type` into the config, between the two fingerprints of the run that saves."""
    _, written = run(tmp_path, **classifier())
    _, read = run(tmp_path, **classifier())
    assert read.losses == 0
    assert same(read.start, written.start)


def test_the_file_of_a_run_with_a_head_warm_up_is_found_again(tmp_path):
    _, written = run(tmp_path, **classifier(head_warmup_steps=2))
    trainer, read = run(tmp_path, **classifier(head_warmup_steps=2))
    assert same(read.start, written.start)
    assert trainer.lora_ga_report.loss_before is None


@pytest.mark.parametrize(
    "change",
    [{"args": {"seed": 11}}, {"args": {"learning_rate": 0.1}}, {"init": "lora_one"}, {"scale": "gd", "gamma": 3}],
)
def test_runs_of_other_seeds_and_other_starts_share_the_file(change, written, tmp_path):
    (tmp_path / "probe.safetensors").write_bytes(written)
    assert run(tmp_path, **change)[1].losses == 0


@pytest.mark.parametrize("wide", [False, True], ids=["exact", "sketched"])
def test_a_lower_rank_shares_the_file(wide, tmp_path):
    """Its factors are those of the stronger pairs: `A` of rank 1 is the first row of `A` of rank 2."""
    sizes, config = (WIDE, SKETCH) if wide else ({}, {"estimator": "exact"})
    _, two = run(tmp_path, base=tiny.llama(**sizes), lora={"r": 2}, **config)
    _, one = run(tmp_path, base=tiny.llama(**sizes), lora={"r": 1}, **config)
    assert one.losses == 0
    for name in (name for name in one.start if "lora_A" in name):
        torch.testing.assert_close(one.start[name][0], two.start[name][0], rtol=1e-4, atol=1e-5)


def test_a_higher_rank_shares_the_file_of_an_exact_gradient(tmp_path):
    run(tmp_path, lora={"r": 2}, estimator="exact")
    _, read = run(tmp_path, lora={"r": 4}, estimator="exact")
    expected = run(tmp_path, lora={"r": 4}, estimator="exact", probe_file=None)[1]
    assert read.losses == 0
    assert same(read.start, expected.start)


def test_a_rank_that_a_sketch_cannot_hold_is_refused_by_the_files_name(tmp_path):
    run(tmp_path, base=tiny.llama(**WIDE), lora={"r": 2}, **SKETCH)
    with pytest.raises(ValueError, match=r"probe\.safetensors.*Delete it"):
        run(tmp_path, base=tiny.llama(**WIDE), lora={"r": 32}, **SKETCH)


def test_a_file_with_fewer_columns_than_the_run_would_choose_is_refused(tmp_path):
    """LoRA-One's file has half of LoRA-GA's columns, a higher rank would choose more. LoRA-GA's serves LoRA-One."""
    one, two = ({"init": init, "min_energy_kept": None} for init in ("lora_one", "lora_ga"))
    lora = {"r": 1}
    run(tmp_path, base=tiny.llama(**WIDE), lora=lora, **one)
    with pytest.raises(ValueError, match=r"sketches of 4 columns.*init='lora_ga' .*would use 8.*Delete it"):
        run(tmp_path, base=tiny.llama(**WIDE), lora=lora, **two)
    (tmp_path / "probe.safetensors").unlink()
    run(tmp_path, base=tiny.llama(**WIDE), lora=lora, **two)
    trainer, read = run(tmp_path, base=tiny.llama(**WIDE), lora=lora, **one)
    assert read.losses == 0
    assert any(layer.sketched for layer in trainer.lora_ga_report.layers)
    with pytest.raises(ValueError, match=r"sketches of 8 columns.*would use 16.*same sketch_size"):
        run(tmp_path, base=tiny.llama(**WIDE), lora={"r": 2}, **two)


def other_head():
    base = tiny.bert()
    with torch.no_grad():
        base.classifier.weight.neg_()
    return base


REFUSED = {
    "data": ({"rows": tiny.causal_rows(16, seed=2)}, "data"),
    "fewer rows": ({"rows": tiny.causal_rows(12)}, "data"),
    "base": ({"base": tiny.llama(seed=1)}, "base"),
    "dtype of the base": ({"base": tiny.llama().bfloat16()}, "base"),
    "layers": ({"lora": {"target_modules": ["q_proj", "down_proj", "v_proj"]}}, "base"),
    "number of samples": ({"num_samples": 4}, "num_samples"),
    "estimator": ({"estimator": "exact"}, "estimator"),
    "sketch size": ({"sketch_size": 40}, "sketch_size"),
}


@pytest.mark.parametrize(("changes", "name"), REFUSED.values(), ids=REFUSED)
def test_the_file_of_another_run_is_refused_by_what_differs(changes, name, written, tmp_path):
    (tmp_path / "probe.safetensors").write_bytes(written)
    seen = AtFirstStep()
    trainer = make_trainer(tmp_path, watch=seen, **changes)
    state = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"probe\.safetensors' does not fit this run: its .*{name}.*Delete it"):
        trainer.train()
    assert same(trainer.model.state_dict(), state)
    assert (seen.start, seen.losses, trainer.state.global_step) == (None, 0, 0)
    assert (tmp_path / "probe.safetensors").read_bytes() == written


def test_the_file_of_another_head_is_refused(tmp_path):
    """The head is warmed up before the file is written, so that only the head differs."""
    run(tmp_path, **classifier(head_warmup_steps=1))
    with pytest.raises(ValueError, match=r"probe\.safetensors' does not fit this run: its heads.*Delete it"):
        run(tmp_path, **classifier(base=other_head(), head_warmup_steps=1))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(b"\xff" * 4096)


def rewritten(change_tensors=lambda tensors: tensors, **metadata):
    def damage(path):
        with safe_open(path, framework="pt") as file:
            kept = file.metadata()
        save_file(change_tensors(load_file(path)), path, metadata=kept | metadata)

    return damage


def without_last(tensors):
    return dict(sorted(tensors.items())[:-1])


def transposed(tensors):
    return {name: tensor.T[:3].contiguous() for name, tensor in tensors.items()}


DAMAGED = {
    "truncated": truncate,
    "empty": empty,
    "garbage": garbage,
    "a tensor is missing": rewritten(without_last),
    "other shapes": rewritten(transposed),
    "figures are no JSON": rewritten(figures="{"),
    "figures are a list": rewritten(figures="[1, 2]"),
    "unknown figures": rewritten(figures=json.dumps({"samples": 8, "colour": 3})),
    "figures are of other types": rewritten(figures=json.dumps({"samples": "eight"})),
    "unreached is no list": rewritten(unreached="7"),
    "not finite": rewritten(lambda tensors: {name: tensor * float("nan") for name, tensor in tensors.items()}),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused_by_its_name(damage, written, tmp_path):
    (tmp_path / "probe.safetensors").write_bytes(written)
    damage(tmp_path / "probe.safetensors")
    trainer = make_trainer(tmp_path)
    state = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"probe\.safetensors' is damaged.*Delete it"):
        trainer.train()
    assert same(trainer.model.state_dict(), state)


@pytest.mark.parametrize("make", ["a checkpoint", "a folder"])
def test_a_path_that_is_something_else_is_refused(make, tmp_path):
    path = tmp_path / "probe.safetensors"
    if make == "a folder":
        path.mkdir()
    else:
        save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"probe\.safetensors"):
        make_trainer(tmp_path).train()


def test_a_layer_that_was_never_reached_is_not_left_plain_in_silence(tmp_path):
    """The file was written where that is allowed, as it is by default; the run that reads it does not allow it."""

    def base():
        model = tiny.llama()
        model.model.aside = torch.nn.Linear(32, 32)
        return model

    lora = {"target_modules": ["q_proj", "aside"]}
    run(tmp_path, base=base(), lora=lora)
    allowed, _ = run(tmp_path, base=base(), lora=lora)
    assert [item.name for item in allowed.lora_ga_report.layers if item.action == Action.UNREACHED] == ["model.aside"]
    with pytest.raises(ValueError, match=r"model\.aside.*allow_unreached"):
        run(tmp_path, base=base(), lora=lora, allow_unreached=False)


def test_a_missing_folder_is_refused_when_the_trainer_is_made(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere/probe\.safetensors.*folder .*nowhere does not exist"):
        make_trainer(tmp_path, probe_file=str(tmp_path / "nowhere" / "probe.safetensors"))


def test_a_file_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "probe.safetensors.partial").mkdir()
    trainer = make_trainer(tmp_path)
    state = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    with pytest.raises(Exception, match=r"probe\.safetensors"):
        trainer.train()
    assert same(trainer.model.state_dict(), state)


def test_nothing_is_left_beside_the_file(tmp_path):
    run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["probe.safetensors", "run"]


class Augmented(torch.utils.data.Dataset):
    """Rows that draw a random number each time they are read."""

    def __init__(self):
        self.rows = tiny.causal_rows(16)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = dict(self.rows[i])
        row["input_ids"] = (row["input_ids"] + torch.randint(0, 2, (1,))) % tiny.VOCABULARY
        return row


def test_reading_rows_for_the_fingerprint_moves_no_random_number(tmp_path):
    """Data that draw random numbers are drawn as without a file."""
    without, _ = run(tmp_path, rows=Augmented(), probe_file=None)
    with_file, _ = run(tmp_path, rows=Augmented())
    assert same(with_file.model.state_dict(), without.model.state_dict())


def test_the_probe_dataset_is_the_one_that_counts(tmp_path):
    def trainer(train_seed, probe_seed):
        return LoRAGATrainer(
            tiny.with_lora(tiny.llama(), **CAUSAL),
            tiny.arguments(tmp_path / "run", max_steps=1),
            train_dataset=tiny.causal_rows(16, seed=train_seed),
            lora_ga_config=LoRAGAConfig(num_samples=8, probe_file=str(tmp_path / "probe.safetensors")),
            probe_dataset=tiny.causal_rows(8, seed=probe_seed),
        )

    trainer(1, 5).train()
    trainer(2, 5).train()
    with pytest.raises(ValueError, match="its data is"):
        trainer(1, 6).train()


def test_a_datasets_dataset_works(tmp_path):
    def rows():
        plain = [{key: value.tolist() for key, value in row.items()} for row in tiny.causal_rows(16)]
        return datasets.Dataset.from_list(plain)

    run(tmp_path, rows=rows())
    assert run(tmp_path, rows=rows())[1].losses == 0


def test_a_plain_model_with_peft_config_shares_the_file_with_the_wrapped_one(written, tmp_path):
    (tmp_path / "probe.safetensors").write_bytes(written)
    seen = AtFirstStep()
    trainer = LoRAGATrainer(
        tiny.llama(),
        tiny.arguments(tmp_path / "run", max_steps=1),
        train_dataset=tiny.causal_rows(16),
        peft_config=LoraConfig(**CAUSAL),
        lora_ga_config=LoRAGAConfig(num_samples=8, probe_file=str(tmp_path / "probe.safetensors")),
        callbacks=[seen],
    )
    seen.watch(trainer)
    trainer.train()
    assert seen.losses == 0


def test_sketches_that_never_turned_share_their_gaussians_and_are_written_all_the_same(tmp_path):
    """One sample has no turning point."""
    few = SKETCH | {"num_samples": 1}
    probed, first = run(tmp_path, base=tiny.llama(**WIDE), **few)
    assert all(layer.sketched for layer in probed.lora_ga_report.layers)
    _, second = run(tmp_path, base=tiny.llama(**WIDE), **few)
    assert second.losses < first.losses
    assert same(first.start, second.start)
