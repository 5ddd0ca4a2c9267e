"""Starts and changes of an adapter that neither a setting of PEFT nor one of this package makes by itself."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from finetuning.encoding import IGNORED
from peft import EvaConfig, LoraConfig, LoraGAConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.optimizers import create_lorafa_optimizer
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from lora_ga_trainer import find_adapted_layers, write_start


@dataclass(frozen=True)
class Samples:
    """
    What a start may read.

    Args:
        train: encoded training rows.
        collate: makes a batch of rows.
        args: of the run: batch size, seed, device, steps.
        count: samples to read, as many as the probes of this package read.
    """

    train: Dataset
    collate: Callable[[list[Any]], dict[str, torch.Tensor]]
    args: TrainingArguments
    count: int

    def batches(self, at_least: int = 1) -> list[dict[str, torch.Tensor]]:
        """
        Return `count` random rows, the same ones on every process, in micro-batches of the training's size.

        Where a start wants `at_least` so many rows a batch, batches are larger and a smaller last one is left out.
        """
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(self.args.seed))
        size = max(self.args.per_device_train_batch_size, at_least)
        chosen = [self.train[int(i)] for i in order[: self.count]]
        return [
            {name: value.to(self.args.device) for name, value in self.collate(chosen[i : i + size]).items()}
            for i in range(0, len(chosen), size)
            if len(chosen) - i >= at_least
        ]


def start_by_eva(model: nn.Module, config: LoraConfig, samples: Samples) -> nn.Module:
    """Let PEFT read the directions of the layers' inputs, and spread the ranks by them."""
    if model.config.is_encoder_decoder:
        raise ValueError("arm 'eva': PEFT masks one sequence a row, not an encoder's and a decoder's. Leave it out.")
    eva = EvaConfig()
    # A layer that reads one vector a row (a pooler) must see as many rows as EVA seeks directions, or PEFT never ends.
    wanted = math.ceil(eva.rho * config.r)
    batches = samples.batches(at_least=wanted)
    if not batches:
        raise ValueError(
            f"arm 'eva': it seeks {wanted} directions a layer and has {samples.count} samples. Use at least "
            f"--num_samples {wanted}."
        )
    labels_of_tokens = batches[0]["labels"].shape == batches[0]["input_ids"].shape
    config.init_lora_weights, config.eva_config = "eva", replace(eva, use_label_mask=labels_of_tokens)
    # Left without memory until PEFT fills it in, as its documentation has it.
    adapted = get_peft_model(model.to(samples.args.device), config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(
        adapted,
        batches,
        prepare_layer_inputs_fn=_select_unmasked_inputs,
        gather_distributed_inputs=False,  # they are the same on every process
        show_progress_bar=False,
    )
    return adapted


def _select_unmasked_inputs(
    layer_input: torch.Tensor | tuple[torch.Tensor, ...], places: torch.Tensor, name: str
) -> torch.Tensor:
    """Return the inputs of a layer at the `places (N, 2)` that are not masked; all of them where a row has but one."""
    x = layer_input if isinstance(layer_input, torch.Tensor) else layer_input[0]
    return x.contiguous() if x.dim() == 2 else x[places.T.unbind()]


def start_by_peft_lora_ga(model: nn.Module, config: LoraConfig, samples: Samples) -> nn.Module:
    """Run PEFT's own LoRA-GA, with its defaults, on the gradient of the mean over all items of the samples."""
    plain = get_peft_model(model, config)
    names = {layer.name for layer in find_adapted_layers(plain)}  # PEFT's routine does not know all-linear
    model = plain.unload().to(samples.args.device).eval()
    config.target_modules, config.init_lora_weights = names, "lora_ga"
    config.lora_ga_config = LoraGAConfig()
    batches = samples.batches()
    items = [_count_items(batch, model) for batch in batches]

    def run_backward() -> None:
        for batch, count in zip(batches, items, strict=True):
            (model(**batch).loss * (count / sum(items))).backward()

    with warnings.catch_warnings():  # of PEFT's own hooks, which do without the gradient of token numbers
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        preprocess_loraga(model, config, run_backward)
    return get_peft_model(model, config)


def _count_items(batch: dict[str, torch.Tensor], model: nn.Module) -> int:
    """Count what the model's loss is a mean over: rows, or label tokens; a causal model skips the first of a row."""
    labels = batch["labels"]
    if labels.dim() > 1 and not model.config.is_encoder_decoder:
        labels = labels[:, 1:]
    return int((labels != IGNORED).sum())


def freeze_orthogonal_A(model: nn.Module, config: LoraConfig, samples: Samples) -> PeftModel:
    """Give every `A` orthonormal rows at random and train `B` alone, from 0."""
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(samples.args.seed)
    for layer in find_adapted_layers(adapted):
        nn.init.orthogonal_(layer.stored_A, generator=generator)
        layer.stored_A.requires_grad_(False)
    return adapted


class _RandomDirections(TrainerCallback):
    """Replace the directions of a LoRA-GA start by random orthonormal ones of the same lengths."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 0:  # resumed
            return
        generator = torch.Generator().manual_seed(args.seed)
        layers = find_adapted_layers(self.trainer.accelerator.unwrap_model(self.trainer.model))
        for layer, report in zip(layers, self.trainer.lora_ga_report.layers, strict=True):
            if report.scale == 0.0:  # it began as plain LoRA: no gradient, no directions
                continue
            (out_features, in_features), r = layer.shape, report.rank
            B0 = nn.init.orthogonal_(torch.empty(out_features, r), report.scale, generator)
            A0 = nn.init.orthogonal_(torch.empty(r, in_features), report.scale, generator)
            write_start(self.trainer, layer, B0, A0)


class _DropTies(TrainerCallback):
    """Make anchored factors plain ones: the same parameters in ordinary linear layers."""

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, model: nn.Module, **kwargs: Any):
        for layer in find_adapted_layers(model):
            for factors in (layer.module.lora_A, layer.module.lora_B):
                factors[layer.adapter] = _make_plain_linear(factors[layer.adapter])


def _make_plain_linear(anchored: nn.Linear) -> nn.Linear:
    linear = nn.Linear(anchored.in_features, anchored.out_features, anchored.bias is not None, device="meta")
    linear.weight, linear.bias = anchored.weight, anchored.bias
    return linear


class _ReallocateRanks(TrainerCallback):
    """Let AdaLoRA move its budget after each step, while the gradients are still there."""

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, model: nn.Module, **kwargs: Any):
        model.base_model.update_and_allocate(state.global_step)


def turn_at_random(trainer: Trainer) -> None:
    """Add the callback of `random_orthogonal`; it must run after the start."""
    trainer.add_callback(_RandomDirections(trainer))


def drop_ties(trainer: Trainer) -> None:
    """Add the callback of `lora_ga_free`; a folder it saves has a `lora_ga.json` that calls it anchored."""
    trainer.add_callback(_DropTies())


def step_by_peft_lora_fa(trainer: Trainer) -> None:
    """Give the trainer PEFT's LoRA-FA optimizer, an AdamW of its own; `optim` of the arguments is not read."""
    args, model = trainer.args, trainer.model
    config = model.peft_config[model.active_adapter]
    trainer.optimizer = create_lorafa_optimizer(
        model, r=config.r, lora_alpha=config.lora_alpha, lr=args.learning_rate, weight_decay=args.weight_decay
    )


def reallocate_ranks(trainer: Trainer) -> None:
    """Add the callback of `adalora`."""
    trainer.add_callback(_ReallocateRanks())
