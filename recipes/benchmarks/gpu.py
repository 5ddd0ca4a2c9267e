"""
Measure on one GPU what this project promises there: tests, starts, steps. One command, under nine minutes on an H100.

    python recipes/benchmarks/gpu.py --output gpu.json
    python recipes/benchmarks/gpu.py --device cpu --quick           # tiny models: shows that every part works

Needs no network and no file beside the repository; weights are random, in bf16. The parts, in order:

* `tests`: those of tests/test_gpu.py that need a GPU;
* `start 1b`, `start 7b`: probe.py, a start beside the passes themselves and beside PEFT's, 64 rows of 1,024 tokens, on
  16 layers of hidden size 2048 and 32 of 4096: seconds, peak and state in bytes;
* `steps 1b`, `steps 7b`, `steps 7b, own moments`: lora_pro.py, both LoRA-Pro optimizers beside AdamW. The moments of
  `lora_pro_adamw` are as large as the weights; on 7B they are in bf16 and have the card to themselves;
* `anchored 1b`, `anchored 7b`: anchored.py, the anchored adapter's step beside plain LoRA's.

Each part is a process with a limit of its own. The file is written after each, and a second run does what it lacks. A
part that fails or runs out of time is told with the end of its output, and the others go on.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from comparison.environment import environment


HERE = Path(__file__).parent
TESTS = HERE.parents[1] / "tests" / "test_gpu.py"
BF16 = ["--dtype", "bfloat16"]


@dataclass(frozen=True)
class Part:
    """A program, its words on a GPU, and the seconds that it may take."""

    program: str
    words: list[str]
    limit: int

    def command(self, quick: bool, output: Path) -> list[str]:
        words = ["--quick"] if quick else self.words
        return [sys.executable, str(HERE / self.program), *words, "--output", str(output)]


STARTS = [*BF16, "--micro_batches", "64", "--tokens", "1024", "--rounds", "1", "--profile"]
# Rounds that disagree are not repeated: the seconds of a part are given.
STEPS = [*BF16, "--rows", "2", "--tokens", "1024", "--rounds", "10", "--most_rounds", "10"]
PARTS = {
    "start 1b": Part("probe.py", ["--model", "llama1b", *STARTS], 90),
    "start 7b": Part("probe.py", ["--model", "llama7b", *STARTS], 180),
    "steps 1b": Part("lora_pro.py", ["--model", "llama1b", *STEPS], 60),
    "steps 7b": Part("lora_pro.py", ["--model", "llama7b", *STEPS, "--optimizers", "adamw", "lora_pro"], 60),
    "steps 7b, own moments": Part(
        "lora_pro.py", ["--model", "llama7b", *STEPS, "--optimizers", "adamw", "lora_pro_adamw bf16"], 90
    ),
    "anchored 1b": Part("anchored.py", ["--model", "llama1b", *STEPS], 60),
    "anchored 7b": Part("anchored.py", ["--model", "llama7b", *STEPS], 90),
}
LIMIT_OF_TESTS, LIMIT_OF_QUICK = 150, 200


def call(command: list[str], limit: float) -> dict[str, Any]:
    """Run a part. Returns its seconds, and under `error` what kept it from ending well."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        said, complained = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the processes of a part would keep the card's memory
        process.communicate()
        return {"seconds": time.perf_counter() - begin, "error": f"ran longer than its {limit:.0f} s"}
    found: dict[str, Any] = {"seconds": time.perf_counter() - begin, "said": said[-2000:]}
    if process.returncode != 0:
        found["error"] = f"exit {process.returncode}: {(said + complained)[-2000:]}"
    return found


def run_tests(quick: bool, limit: float) -> dict[str, Any]:
    chosen = ["-k", "fp64_twin and fp32-cpu"] if quick else ["-m", "gpu"]
    words = ["-q", "-p", "no:cacheprovider", "--no-header", *chosen, str(TESTS)]
    return call([sys.executable, "-m", "pytest", *words], limit)


def run_part(part: Part, quick: bool, limit: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        found = call(part.command(quick, output), limit)
        if output.exists():
            found["result"] = json.loads(output.read_text(encoding="utf-8"))
    return found


def lines_of(name: str, found: dict[str, Any]) -> list[str]:
    """Return the rows of the table for one part: part, what, figure."""
    if "error" in found:
        return [f"| {name} | failed | {found['error'].splitlines()[-1][-120:]} |"]
    if name == "tests":
        return [f"| tests | | {found['said'].strip().splitlines()[-1]} |"]
    result = found["result"]
    if name.startswith("start"):
        rows = [(key, f"{row['median']:.3f}") for key, row in result["summary"].items()]
        last = result["rounds"][-1]
        rows += [(f"{who}, seconds", f"{last[who]['seconds']:.2f}") for who in ("floor", "ours", "peft")]
        rows += [
            (f"{who}, peak beyond a plain step", f"{last[who]['extra_peak'] / 2**30:.2f} GiB")
            for who in ("ours", "peft")
        ]
    elif name.startswith("steps"):
        tokens = result["arguments"]["rows"] * result["arguments"]["tokens"]
        rows = [
            (
                f"{key}, tokens a second (share of AdamW's)",
                f"{tokens / (row['passes_seconds'] + row['step_seconds']):.0f} ({row['throughput']:.3f})",
            )
            for key, row in result["results"].items()
        ]
    else:
        summary = result["summary"]
        rows = [("seconds of an anchored step over a plain one", f"{summary['anchored / plain']:.3f}")]
    return [f"| {name} | {what} | {figure} |" for what, figure in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny models, the only way on a CPU")
    parser.add_argument("--parts", nargs="+", choices=["tests", *PARTS], help="default: all; --quick leaves out 7b")
    parser.add_argument("--seconds", type=float, default=520, help="of all parts together; a part gets what is left")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="continued, if it is there")
    args = parser.parse_args()
    if args.device == "cpu" and not args.quick:
        parser.error("--device cpu: the models are those of a GPU. Add --quick, or leave --device out.")
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the parts, too
    elif not torch.cuda.is_available():
        parser.error("torch sees no GPU here. Try the program with --device cpu --quick.")
    os.environ["HF_HUB_OFFLINE"] = "1"
    settings = {"quick": args.quick, **environment()}
    kept = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    if kept and {key: kept.get(key) for key in settings} != settings:
        parser.error(f"--output {args.output}: it holds figures of other settings or another machine. Name another.")
    parts: dict[str, Any] = kept.get("parts", {})
    begin = time.monotonic()
    print("| part | what | figure |\n|---|---|---|")
    for name in args.parts or ["tests", *(name for name in PARTS if not (args.quick and "7b" in name))]:
        left = args.seconds - (time.monotonic() - begin)
        if name not in parts or "error" in parts[name]:
            if left < 1:
                print(f"| {name} | not run | the {args.seconds:.0f} s are over: run the command again |", flush=True)
                continue
            if name == "tests":
                parts[name] = run_tests(args.quick, min(LIMIT_OF_TESTS, left))
            else:
                # A quick part computes little, but on a busy CPU its processes take long to import.
                limit = LIMIT_OF_QUICK if args.quick else PARTS[name].limit
                parts[name] = run_part(PARTS[name], args.quick, min(limit, left))
            args.output.write_text(json.dumps(settings | {"parts": parts}, indent=1) + "\n", encoding="utf-8")
        print("\n".join(lines_of(name, parts[name])), flush=True)


if __name__ == "__main__":
    main()
