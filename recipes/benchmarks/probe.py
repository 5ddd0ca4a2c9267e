"""
Measure what a start costs: time and memory of LoRA-GA here and in PEFT, beside the passes themselves.

    python recipes/benchmarks/probe.py --model llama2048 --output probe.json      # 16 micro-batches of 512 tokens
    python recipes/benchmarks/probe.py --model llama2048 --micro_batches 4
    python recipes/benchmarks/probe.py --model smollm2
    python recipes/benchmarks/probe.py --quick                                    # tiny, seconds: shows it works

In each round three processes take turns, in a rotating order, on the same micro-batches: `floor` passes them forward
and backward through the model with a plain adapter of rank 8, which nothing that takes gradients can undercut; `ours`
runs `LoRAGATrainer` up to its first step; `peft` runs `preprocess_loraga` and `get_peft_model`. Each takes a plain
LoRA step first; its extra peak is what it then held beyond the peak of that step. Ratios are of the same round. Where
rounds disagree by more than 10% there are more of them, see rounds.py. A GPU is used where there is one. `ours` passes
once: gradients of random models are flatter than real ones, and a second look at what a sketch keeps of them would
double the passes. `--min_energy_kept .9` takes it as a trainer would.
`--worker ours --init gradient_directions --whitening .25` runs another start alone, once.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from comparison.environment import environment
from comparison.memory import PeakMemory
from cost_models import MODELS, clock
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga
from rounds import add_arguments, most_rounds, run_rounds, spread, tell
from torch import Tensor, nn
from torch.profiler import profile, supported_activities
from transformers import TrainerCallback, TrainingArguments

from lora_ga_trainer import INITS, LoRAGAConfig, LoRAGATrainer


LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def passes(model: nn.Module, batches: list[Tensor]) -> None:
    for ids in batches:
        model(input_ids=ids, labels=ids).loss.backward()


def plain_step(model: nn.Module, batches: list[Tensor], rank: int) -> tuple[nn.Module, int]:
    """Put a plain adapter on the model, take a step with one micro-batch; return both and the peak of the step."""
    peak = PeakMemory()
    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules=LAYERS))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.0)
    passes(adapted, batches[:1])
    optimizer.step()
    optimizer.zero_grad()
    return adapted, peak.bytes()


def run_floor(model: nn.Module, batches: list[Tensor], rank: int) -> dict[str, float]:
    adapted, before = plain_step(model, batches, rank)
    peak, begin = PeakMemory(), clock()
    passes(adapted, batches)
    return {"seconds": clock() - begin, "extra_peak": peak.bytes() - before, "state": 0}


def run_peft(model: nn.Module, batches: list[Tensor], rank: int) -> dict[str, float]:
    adapted, before = plain_step(model, batches, rank)
    model = adapted.unload()
    config = LoraConfig(
        r=rank,
        target_modules=LAYERS,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
        task_type="CAUSAL_LM",
    )
    peak, begin = PeakMemory(), clock()
    preprocess_loraga(model, config, lambda: passes(model, batches))
    passed = clock()
    gradients = [m._peft_loraga_grad for m in model.modules() if hasattr(m, "_peft_loraga_grad")]
    get_peft_model(model, config)
    return {
        "seconds": clock() - begin,
        "init_seconds": clock() - passed,
        "extra_peak": peak.bytes() - before,
        "state": sum(g.numel() * g.element_size() for g in gradients),
    }


class _AtFirstStep(TrainerCallback):
    """Notes the peak when the start is over."""

    def __init__(self) -> None:
        self.peak = PeakMemory()
        self.bytes = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.bytes = self.peak.bytes()
        control.should_training_stop = True


def run_ours(model: nn.Module, batches: list[Tensor], args: argparse.Namespace) -> dict[str, float | str]:
    adapted, before = plain_step(model, batches, args.rank)
    rows = [{"input_ids": ids, "labels": ids} for batch in batches for ids in batch.cpu()]  # as data sets hold them
    config = LoRAGAConfig(
        init=args.init,
        whitening=args.whitening,
        supported_only=args.supported_only,
        num_samples=len(rows),
        estimator=args.estimator,
        min_energy_kept=args.min_energy_kept,
    )
    profiled = args.worker == "profile"
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=1,
            per_device_train_batch_size=len(batches[0]),
            train_sampling_strategy="sequential",
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = LoRAGATrainer(adapted, arguments, train_dataset=rows, lora_ga_config=config)
        look = _AtFirstStep()
        trainer.add_callback(look)
        with profile(activities=supported_activities()) if profiled else nullcontext() as profiler:
            trainer.train()
    report = trainer.lora_ga_report
    if profiled:
        sort = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        return {"profile": profiler.key_averages().table(sort_by=sort, row_limit=20)}
    return {
        "seconds": report.seconds,
        "init_seconds": report.seconds - report.probe_seconds,
        "extra_peak": look.bytes - before,
        "state": report.probe_bytes,
        "layers": len(report.layers),
        "sketched": sum(layer.sketched for layer in report.layers),
        "seen_twice": sum(layer.seen_twice for layer in report.layers),
    }


def work(args: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MODELS[args.model](getattr(torch, args.dtype)).to(device)
    shape = (args.micro_batches, args.rows, args.tokens)
    batches = list(torch.randint(0, 4096, shape, device=device))
    if args.worker == "floor":
        return run_floor(model, batches, args.rank)
    if args.worker == "peft":
        return run_peft(model, batches, args.rank)
    return run_ours(model, batches, args)


def launch(worker: str, words: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, *words, "--worker", worker]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{worker} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ratios_of(rounds: list[dict[str, dict[str, float]]]) -> dict[str, list[float]]:
    pairs = (("ours", "floor"), ("peft", "floor"), ("peft", "ours"))
    return {f"{a} / {b}": [row[a]["seconds"] / row[b]["seconds"] for row in rounds] for a, b in pairs}


def summarise(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict]:
    found = {name: spread(ratios) for name, ratios in ratios_of(rounds).items()}
    for key in ("state", "extra_peak"):
        found[f"{key}, ours / peft"] = {
            "median": statistics.median(row["ours"][key] / row["peft"][key] for row in rounds)
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama2048")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--micro_batches", type=int, default=16)
    parser.add_argument("--rows", type=int, default=1, help="rows of a micro-batch")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--estimator", choices=("sketch", "exact"), default="sketch")
    parser.add_argument("--init", choices=INITS, default="lora_ga", help="of `ours`")
    parser.add_argument("--whitening", type=float, default=0.0, help="of `ours`")
    parser.add_argument("--supported_only", action="store_true", help="of `ours`")
    parser.add_argument("--min_energy_kept", type=float, help="look again at layers below it; default: never")
    add_arguments(parser, rounds=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="add a table of the operators of one more start")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 4 x 32 tokens, one round")
    parser.add_argument("--output", help="a JSON file for the figures")
    parser.add_argument("--worker", choices=("floor", "ours", "peft", "profile"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.model, args.micro_batches, args.tokens, args.rounds, args.most_rounds = "tiny", 4, 32, 1, 1
    if args.worker:
        print(json.dumps(work(args)))
        return
    names = ["floor", "ours", "peft"]

    def one_round(number: int) -> dict[str, dict[str, float]]:
        order = names[number % 3 :] + names[: number % 3]
        found = {name: launch(name, sys.argv[1:]) for name in order}
        for name in names:
            print(f"round {number + 1}: {name:5s} {json.dumps(found[name])}", flush=True)
        return found

    rounds = run_rounds(one_round, ratios_of, args.rounds, most_rounds(args))
    result = {"arguments": vars(args), **environment(), "rounds": rounds, "summary": summarise(rounds)}
    if args.profile:
        result |= launch("profile", sys.argv[1:])
        print(result["profile"])
    for name, row in result["summary"].items():
        print(f"{name:24s} " + (tell(row) if "rounds" in row else f"{row['median']:.3f}"))
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
