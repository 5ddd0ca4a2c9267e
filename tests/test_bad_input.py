"""Bad input: the error says what is wrong, where, and what to do, early, and leaves every weight alone.

Each case runs through `LoRAGATrainer` and through `Trainer` with a bare `LoRAGACallback`.
"""

import json
import shutil
from types import SimpleNamespace

import peft
import pytest
import tiny
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import Trainer

from lora_ga_trainer import LoRAGACallback, LoRAGAConfig, LoRAGATrainer, load_adapter
from lora_ga_trainer.adapters.find import find_lora_layers
from lora_ga_trainer.engines.support import require_supported
from lora_ga_trainer.optimizers.build import require_buildable
from lora_ga_trainer.starts.prepare import prepare_adapter


@pytest.fixture(params=["trainer", "callback"])
def build(request, tmp_path):
    """Return a function that makes a trainer with the start, in one of the two ways."""

    def make(model, config=None, rows=8, kind=Trainer, args=None, **kwargs):
        config = LoRAGAConfig(num_samples=4) if config is None else config
        settings = {"model": model, "args": tiny.arguments(tmp_path / "run", max_steps=2, **(args or {}))}
        settings["train_dataset"] = tiny.causal_rows(rows) if isinstance(rows, int) else rows
        if request.param == "trainer":
            ours = type("Ours", (LoRAGATrainer, kind), {}) if kind is not Trainer else LoRAGATrainer
            return ours(**settings, lora_ga_config=config, **kwargs)
        trainer = kind(**settings, **kwargs)
        trainer.add_callback(LoRAGACallback(trainer, config))
        return trainer

    return make


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def lora(**changes):
    return tiny.with_lora(tiny.llama(), **({"target_modules": ["q_proj", "down_proj"]} | changes))


def trained():
    model = lora()
    with torch.no_grad():
        for layer in find_lora_layers(model)[2:]:  # not the first: every layer must be looked at
            layer.lora_B.weight.fill_(0.01)
    return model


def merged():
    model = lora()
    model.merge_adapter()
    return model


def frozen():
    model = lora()
    model.requires_grad_(False)
    return model


def two_active():
    model = lora()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return model


def with_ia3():
    return get_peft_model(tiny.llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))


def sparse():
    model = lora(target_modules=["embed_tokens", "q_proj"])
    model.get_base_model().model.embed_tokens.base_layer.sparse = True
    return model


REFUSED_MODELS = {
    "no adapter": (tiny.llama, r"LlamaForCausalLM without a PEFT adapter.*peft_config=LoraConfig"),
    "IA3": (with_ia3, r"'default' is of type .*IA3, not LoRA.*init='none'"),
    "trained": (
        trained,
        r"'default' is already trained: at model\.layers\.1\.self_attn\.q_proj.*init='none'.*load_adapter",
    ),
    "merged": (merged, r"model\.layers\.0\.self_attn\.q_proj.*merged.*unmerge_adapter"),
    "frozen": (frozen, r"no trainable LoRA layer \(4 frozen\).*is_trainable=True"),
    "two active": (two_active, r"\['default', 'second'\].*set_adapter"),
    "an embedding with sparse gradients": (sparse, r"embed_tokens.*sparse=True.*target_modules"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED_MODELS.values(), ids=REFUSED_MODELS)
@pytest.mark.parametrize("init", ["lora_ga", "lora_one"])
def test_a_model_that_cannot_be_started_is_refused(make, message, init, build):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        build(model, LoRAGAConfig(init=init))
    assert unchanged(model, before)


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal"])
def test_a_start_of_pefts_own_is_refused_as_a_second_start(start, build):
    model = lora(init_lora_weights=start)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"init_lora_weights='{start}'.*two starts.*init_lora_weights=True"):
        build(model)
    assert unchanged(model, before)


@pytest.mark.parametrize("start", [True, "gaussian"])
def test_a_plain_start_of_peft_is_replaced(start, build):
    trainer = build(lora(init_lora_weights=start))
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (lambda: peft.LoraGAConfig(), r"peft\..*LoraGAConfig"),
        (lambda: LoraConfig(), r"peft\..*LoraConfig"),
        (lambda: {"init": "lora_ga"}, r"builtins\.dict"),
    ],
)
def test_a_config_of_another_package_is_a_type_error(config, kind, build):
    model = lora()
    before = snapshot(model)
    with pytest.raises(TypeError, match=rf"{kind}.*lora_ga_trainer\.LoRAGAConfig"):
        build(model, config())
    assert unchanged(model, before)


def test_empty_data_is_refused_before_the_adapter_is_touched(build):
    model = lora()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"empty \(0 examples\).*filters"):
        build(model, rows=[])
    assert unchanged(model, before)


def test_a_trainer_without_train_data_can_still_evaluate(build):
    trainer = build(lora(), rows=None, eval_dataset=tiny.causal_rows(4))
    assert trainer.evaluate()["eval_loss"] > 0


def without(rows, key):
    return [{name: value for name, value in row.items() if name != key} for row in rows]


def test_data_without_labels_is_refused_by_its_columns_before_a_step(build):
    trainer = build(lora(), rows=without(tiny.causal_rows(8), "labels"))
    before = snapshot(trainer.model)
    with pytest.raises(ValueError, match=r"no labels.*\['attention_mask', 'input_ids'\].*`labels`.*data collator"):
        trainer.train()
    assert unchanged(trainer.model, before)
    assert trainer.state.global_step == 0


def test_labels_that_are_all_ignored_are_refused_before_a_step(build):
    rows = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in tiny.causal_rows(8)]
    trainer = build(lora(), rows=rows)
    before = snapshot(trainer.model)
    with pytest.raises(ValueError, match=r"no label to learn from \(all are -100.*data collator"):
        trainer.train()
    assert unchanged(trainer.model, before)
    assert trainer.state.global_step == 0


def test_a_layer_that_the_loss_never_reaches_is_refused_by_name_where_the_user_wants_it(build):
    base = tiny.llama()
    base.model.aside = torch.nn.Linear(32, 32)
    config = LoRAGAConfig(num_samples=4, allow_unreached=False)
    trainer = build(tiny.with_lora(base, target_modules=["q_proj", "aside"]), config)
    before = snapshot(trainer.model)
    with pytest.raises(ValueError, match=r"never reaches 1 adapted layers: model\.aside.*allow_unreached=True"):
        trainer.train()
    assert unchanged(trainer.model, before)


class TestOptimizers:
    def test_an_optimizer_that_exists_already_is_refused(self, build):
        model = lora()
        before = snapshot(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with pytest.raises(ValueError, match=r"optimizer exists already.*`optimizer_cls_and_kwargs=`"):
            build(model, optimizers=(optimizer, None))
        assert unchanged(model, before)

    def test_the_way_out_that_it_names_trains(self, build):
        choice = (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1})
        trainer = build(lora(), optimizer_cls_and_kwargs=choice, args={"weight_decay": 0.1})
        trainer.train()
        assert trainer.state.global_step == 2

    def test_weight_decay_of_anchored_parameters_is_refused_by_name(self, build):
        class Decaying(Trainer):
            def create_optimizer(self, model=None):
                live = [p for p in self.model.parameters() if p.requires_grad]
                self.optimizer = torch.optim.AdamW(live, lr=1e-3, weight_decay=0.1)
                return self.optimizer

        trainer = build(lora(), kind=Decaying)
        before = snapshot(trainer.model)
        with pytest.raises(
            ValueError, match=r"\.lora_A\.default\.weight: .*weight_decay=0\.1.*a group with weight_decay 0"
        ):
            trainer.train()
        assert unchanged(trainer.model, before)
        assert trainer.state.global_step == 0

    def test_a_group_without_decay_is_the_way_out(self, build):
        class Grouped(Trainer):
            def create_optimizer(self, model=None):
                live = [p for p in self.model.parameters() if p.requires_grad]
                groups = [{"params": live, "weight_decay": 0.0}]
                self.optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
                return self.optimizer

        trainer = build(lora(), kind=Grouped)
        trainer.train()
        assert trainer.state.global_step == 2

    def test_an_optimizer_that_does_not_hold_the_anchored_parameters_is_refused(self, build):
        """It would train what the anchored factors replaced, or nothing."""

        class Elsewhere(Trainer):
            def create_optimizer(self, model=None):
                self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=1e-3)
                return self.optimizer

        trainer = build(lora(), kind=Elsewhere)
        before = snapshot(trainer.model)
        with pytest.raises(ValueError, match=r"\.lora_A\.default\.weight: .*optimizer"):
            trainer.train()
        assert unchanged(trainer.model, before)


def test_peft_config_with_a_peft_model_is_refused(tmp_path):
    model = lora()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"peft_config.*has an adapter already.*one of the two"):
        LoRAGATrainer(
            model,
            tiny.arguments(tmp_path),
            train_dataset=tiny.causal_rows(8),
            peft_config=LoraConfig(target_modules=["q_proj"]),
        )
    assert unchanged(model, before)


def test_a_peft_config_of_another_kind_is_refused(tmp_path):
    model = tiny.llama()
    weights = snapshot(model)
    with pytest.raises(ValueError, match=r"IA3, not LoRA"):
        LoRAGATrainer(
            model,
            tiny.arguments(tmp_path),
            train_dataset=tiny.causal_rows(8),
            peft_config=IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        )
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())


def test_a_probe_file_in_a_missing_folder_is_refused_before_a_step(build, tmp_path):
    model = lora()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"nowhere/probe\.safetensors'.*nowhere does not exist.*Make it"):
        build(model, LoRAGAConfig(num_samples=4, probe_file=str(tmp_path / "nowhere" / "probe.safetensors")))
    assert unchanged(model, before)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Checkpoints of four runs of 2 steps, by name."""
    folder = tmp_path_factory.mktemp("runs")
    for name, init, rank in (("lora_ga", "lora_ga", 4), ("lora_one", "lora_one", 4), ("rank 2", "lora_ga", 2)):
        LoRAGATrainer(
            lora(r=rank, lora_alpha=2 * rank),
            tiny.arguments(folder / name, max_steps=2, save_strategy="steps", save_steps=2),
            train_dataset=tiny.causal_rows(8),
            lora_ga_config=LoRAGAConfig(init=init, num_samples=4),
        ).train()
    Trainer(
        lora(),
        tiny.arguments(folder / "plain", max_steps=2, save_strategy="steps", save_steps=2),
        None,
        tiny.causal_rows(8),
    ).train()
    return folder


def no_record(checkpoint):
    (checkpoint / "lora_ga.json").unlink()


def damaged_record(checkpoint):
    path = checkpoint / "lora_ga.json"
    path.write_text(path.read_text()[:-20])


def other_base(checkpoint):
    path = checkpoint / "lora_ga.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base": "f" * 32}))


REFUSED_CHECKPOINTS = {
    "its record is lost": (
        "lora_ga",
        no_record,
        "lora_ga",
        r"has no lora_ga\.json.*init='none'.*restore lora_ga\.json",
    ),
    "its record is damaged": (
        "lora_ga",
        damaged_record,
        "lora_ga",
        r"lora_ga\.json is not a record.*Restore the file",
    ),
    "a plain one": ("plain", None, "lora_ga", r"has no lora_ga\.json.*LoRAGAConfig\(init='none'\)"),
    "a plain one for lora_one": ("plain", None, "lora_one", r"has no lora_ga\.json"),
    "another rank": ("rank 2", None, "lora_ga", r"trained with rank=2, this run has rank=4.*Resume with"),
    "another init": ("lora_one", None, "lora_ga", r"trained with init='lora_one', this run has init='lora_ga'"),
    "another init, reversed": (
        "lora_ga",
        None,
        "lora_one",
        r"trained with init='lora_ga', this run has init='lora_one'",
    ),
    "another base": ("lora_ga", other_base, "lora_ga", r"trained with base='f{32}', this run has base="),
}


@pytest.mark.parametrize(("run", "damage", "init", "message"), REFUSED_CHECKPOINTS.values(), ids=REFUSED_CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_continued_is_refused_before_it_is_loaded(
    run, damage, init, message, build, runs, tmp_path
):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(runs / run / "checkpoint-2", checkpoint)
    if damage is not None:
        damage(checkpoint)
    trainer = build(lora(), LoRAGAConfig(init=init, num_samples=4))
    before = snapshot(trainer.model)
    with pytest.raises(ValueError, match=rf"checkpoint-2.*{message}"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert unchanged(trainer.model, before)
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("call", ["positional", "keyword", "last"])
def test_every_way_to_name_a_checkpoint_is_checked(call, build, runs, tmp_path):
    shutil.copytree(runs / "rank 2" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    trainer = build(lora())
    folder = str(tmp_path / "run" / "checkpoint-2")
    arguments, names = {
        "positional": ([folder], {}),
        "keyword": ([], {"resume_from_checkpoint": folder}),
        "last": ([], {"resume_from_checkpoint": True}),
    }[call]
    with pytest.raises(ValueError, match="rank=2, this run has rank=4"):
        trainer.train(*arguments, **names)


def test_training_from_the_start_works_after_a_refused_checkpoint(build, runs):
    trainer = build(lora())
    with pytest.raises(ValueError, match="rank=2"):
        trainer.train(resume_from_checkpoint=str(runs / "rank 2" / "checkpoint-2"))
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("init", ["lora_ga", "lora_one"])
def test_a_checkpoint_of_the_same_start_is_continued(init, build, runs):
    """The counterpart of the refusals: nothing is refused that can be continued, and no probe is run."""
    trainer = build(lora(), LoRAGAConfig(init=init, num_samples=4))
    trainer.args.max_steps = 3
    trainer.train(resume_from_checkpoint=str(runs / init / "checkpoint-2"))
    assert trainer.state.global_step == 3
    # The history comes from the checkpoint: one start, that of the run that wrote it.
    assert [entry["step"] for entry in trainer.state.log_history if "lora_ga/samples" in entry] == [0]


def test_an_adapter_that_was_started_before_needs_no_train_dataset(build, runs):
    """Nothing will be probed, so a trainer that only evaluates is made as with `Trainer`."""
    model = load_adapter(tiny.llama(), runs / "lora_ga" / "checkpoint-2")
    trainer = build(model, rows=None, eval_dataset=tiny.causal_rows(4))
    assert trainer.evaluate()["eval_loss"] > 0


def test_resuming_a_missing_folder_or_from_an_empty_output_folder_is_the_trainers_own_error(build, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=r"No valid checkpoint found in output directory"):
        build(lora()).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"Can't find a valid checkpoint at .*nowhere"):
        build(lora()).train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_fsdp1_with_flattened_parameters_is_refused():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=1, use_orig_params=False)
    state = SimpleNamespace(fsdp_plugin=plugin)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(distributed_type=DistributedType.FSDP, state=state), model=None
    )
    with pytest.raises(ValueError, match=r"use_orig_params=False flattens .* Set fsdp_use_orig_params: true"):
        require_supported(trainer)
    plugin.use_orig_params = True
    require_supported(trainer)


def test_experts_on_several_gpus_without_a_launcher_are_refused():
    model = get_peft_model(tiny.qwen3_moe(), LoraConfig(r=2, target_parameters=["mlp.experts.down_proj"]))
    for layer in [*find_lora_layers(model), *find_lora_layers(lora())]:  # plain factors can be copied
        layer.require_whole(copies=2)
    prepare_adapter(model, LoRAGAConfig())
    with pytest.raises(ValueError, match=r"experts\.down_proj: nn\.DataParallel, .* on 2 GPUs.*accelerate launch"):
        find_lora_layers(model)[0].require_whole(copies=2)


@pytest.mark.parametrize("correction", ["lora_pro", "lora_pro_adamw"])
def test_a_correction_on_a_device_without_fp64_is_refused(correction, tmp_path):
    args = tiny.arguments(tmp_path)
    trainer = SimpleNamespace(args=SimpleNamespace(device=torch.device("mps"), optim=args.optim), optimizer=None)
    with pytest.raises(ValueError, match=rf"correction='{correction}' computes in fp64.*\(mps\)"):
        require_buildable(trainer, LoRAGAConfig(correction=correction).optimizer)
