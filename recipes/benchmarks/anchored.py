"""
Measure what an anchored adapter costs in training, beside plain LoRA of the same rank.

    python recipes/benchmarks/anchored.py --model llama2048 --output anchored.json
    python recipes/benchmarks/anchored.py --quick                                    # tiny, seconds: shows it works

An anchored adapter of rank r is stored with rank 2r (`lora_ga_trainer.adapters.anchor`), half of one factor frozen.
Two copies of one base take training steps with AdamW in turn, the one that is first changing every round; a ratio is
that of two steps of one round. Where rounds disagree there are more of them, see rounds.py. Two processes measure the
peak memory of a step each. A GPU is used where there is one.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from comparison.environment import environment
from comparison.memory import PeakMemory
from cost_models import MODELS, clock
from peft import LoraConfig, PeftModel, get_peft_model
from rounds import add_arguments, most_rounds, run_rounds, spread, tell
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from lora_ga_trainer import LoRAGACallback, LoRAGAConfig, find_adapted_layers, write_start


KINDS = ("plain", "anchored")


def make_adapter(base: nn.Module, kind: str, rank: int) -> PeftModel:
    """Adapt all linear layers; both kinds begin with factors that are not zero, so that nothing is skipped."""
    model = get_peft_model(base, LoraConfig(r=rank, target_modules="all-linear"))
    with tempfile.TemporaryDirectory() as folder:
        # Without a data set a trainer only evaluates, and its adapter is left as it is. This one is never read.
        trainer = Trainer(model, TrainingArguments(folder, report_to=[]), train_dataset=[{"input_ids": [0]}])
    if kind == "anchored":
        LoRAGACallback(trainer, LoRAGAConfig())  # anchors the layers
    for layer in find_adapted_layers(model):
        out_features, in_features = layer.shape
        write_start(trainer, layer, torch.randn(out_features, rank) * 0.02, torch.randn(rank, in_features) * 0.02)
    return model


class Training:
    """A model and what trains it."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-7, weight_decay=0.0)

    def step(self, ids: Tensor) -> float:
        """Take one step; return its seconds."""
        begin = clock()
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return clock() - begin


def make_base(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = MODELS[args.model](getattr(torch, args.dtype)).to(device)
    return base, torch.randint(0, 4096, (args.rows, args.tokens), device=device)


def time_steps(args: argparse.Namespace) -> list[dict[str, float]]:
    base, ids = make_base(args)
    trainings = {kind: Training(make_adapter(copy.deepcopy(base), kind, args.rank)) for kind in KINDS}
    for training in trainings.values():
        training.step(ids)  # allocates states
    one_round = lambda number: {kind: trainings[kind].step(ids) for kind in KINDS[:: -1 if number % 2 else 1]}
    return run_rounds(one_round, ratios_of, args.rounds, most_rounds(args))


def ratios_of(rounds: list[dict[str, float]]) -> dict[str, list[float]]:
    return {"anchored / plain": [row["anchored"] / row["plain"] for row in rounds]}


def measure_peak(args: argparse.Namespace) -> dict[str, int]:
    """Return the peak of the second step; the first one allocates the optimizer's states."""
    base, ids = make_base(args)
    training = Training(make_adapter(base, args.worker, args.rank))
    training.step(ids)
    peak = PeakMemory()
    training.step(ids)
    return {"peak": peak.bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama2048")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8)
    add_arguments(parser, rounds=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny model, 3 rounds")
    parser.add_argument("--output", help="a JSON file for the figures")
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.model, args.rounds, args.most_rounds, args.tokens = "tiny", 3, 3, 32
    if args.worker:
        print(json.dumps(measure_peak(args)))
        return
    peaks = {}
    for kind in KINDS:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[kind] = json.loads(done.stdout.splitlines()[-1])["peak"]
    rounds = time_steps(args)
    ratios = ratios_of(rounds)["anchored / plain"]
    summary = {
        "anchored / plain": statistics.median(ratios),
        "rounds": spread(ratios),
        "plain_seconds": statistics.median(row["plain"] for row in rounds),
        "peaks": peaks,
    }
    print(f"anchored / plain {tell(summary['rounds'])}")
    print(json.dumps(summary))
    if args.output:
        result = {"arguments": vars(args), **environment(), "summary": summary, "rounds": rounds}
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
