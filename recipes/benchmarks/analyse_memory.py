"""
Measure what the analysis of an adapter holds in memory, on the shapes of a large model.

    OMP_NUM_THREADS=1 python recipes/benchmarks/analyse_memory.py --layers 1 2

Writes a folder of bf16 weights with the shapes of Llama-2-70B, one file of safetensors a decoder layer, and an adapter
of r = 16 on all of its linear layers. The weights are random, with 16 directions that stand out as those of trained
weights do. `analyse_adapter` reads the folder in a process of its own, and the peak of that process is `VmHWM` of the
kernel less what it held before. A decoder layer takes 1.7 GB on the disk.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from lora_ga_trainer import analyse_adapter


HIDDEN, INNER, KEYS = 8192, 28672, 1024
WEIGHTS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
RANK = STRONG = 16


def write_layer(base: Path, layer: int) -> dict[str, torch.Tensor]:
    """Write the weights of a decoder layer, and return factors for them that change each by about 1%."""
    torch.manual_seed(layer)
    weights, factors = {}, {}
    for kind, (out, inner) in WEIGHTS.items():
        name = f"model.layers.{layer}.{kind}"
        W = torch.randn(out, inner).mul_(0.02)  # its singular values end near .02 (sqrt(out) + sqrt(in))
        ends = 0.02 * (out**0.5 + inner**0.5) * torch.linspace(6, 2, STRONG)
        U, V = (torch.linalg.qr(torch.randn(size, STRONG)).Q for size in (out, inner))
        weights[f"{name}.weight"] = W.addmm_(U * ends, V.T).bfloat16()
        factors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, inner) / inner**0.5
        factors[f"base_model.model.{name}.lora_B.weight"] = 0.0004 * torch.randn(out, RANK) * (inner / RANK) ** 0.5
    save_file(weights, base / f"model-{layer + 1:05d}.safetensors")
    return factors


def write(folder: Path, layers: int) -> None:
    base, adapter = folder / "base", folder / "adapter"
    for place in (base, adapter):
        place.mkdir(parents=True, exist_ok=True)
    factors = {}
    for layer in range(layers):
        factors |= write_layer(base, layer)
    save_file(factors, adapter / "adapter_model.safetensors")
    names = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in WEIGHTS]
    LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, base_model_name_or_path=str(base)).save_pretrained(
        str(adapter)
    )


def held() -> int:
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def analyse(folder: Path, k: int) -> dict[str, float]:
    before, begin = held(), time.process_time()
    report = analyse_adapter(folder / "base" if k else None, folder / "adapter", k=k)
    return {
        "weights": len(report.layers),
        "peak": held() - before,
        "seconds": time.process_time() - begin,
        "change": max(layer.relative_norm or 0.0 for layer in report.layers),
        "screened": sum(bool(layer.screened) for layer in report.layers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2], help="decoder layers of each folder")
    parser.add_argument("--k", type=int, nargs="+", default=[0, 10], help="directions looked at for intruders")
    parser.add_argument("--analyse", type=Path, help=argparse.SUPPRESS)  # the folder, in the process that is measured
    args = parser.parse_args()
    if args.analyse is not None:
        print(json.dumps(analyse(args.analyse, args.k[0])))
        return
    print("| decoder layers | k | weights | peak, GiB | CPU seconds | largest change | cleared by the screen |")
    print("|---|---|---|---|---|---|---|")
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), layers)
            for k in args.k:
                command = [sys.executable, __file__, "--analyse", folder, "--k", str(k)]
                found = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
                print(
                    f"| {layers} | {k} | {found['weights']} | {found['peak'] / 2**30:.2f} | {found['seconds']:.0f} | "
                    f"{found['change']:.2%} | {found['screened']} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
