"""
Average the changes that adapters of several runs make, and write the result as one adapter.

    python recipes/average_adapters.py outputs/seed0 outputs/seed1 --output outputs/average
    python recipes/average_adapters.py outputs/seed0 outputs/seed1 --output outputs/average --rank 8
    python recipes/average_adapters.py outputs/seed0 --output outputs/smaller --weights 0.9

No base is read. Without --rank the result is exact, at the sum of the ranks. Printed is the relative error of each
layer and of all of them; a picture of it goes into the output folder.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from lora_ga_trainer import average_adapters


@dataclass
class AverageArguments:
    """Say what the result is and where it goes."""

    output: str = field(metadata={"help": "Folder of the result."})
    weights: list[float] | None = field(
        default=None, metadata={"help": "A number for each adapter; they need not sum to 1. Default: the mean."}
    )
    rank: int | None = field(
        default=None, metadata={"help": "Rank of every layer of the result. Default: the sum of the ranks, exact."}
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser(AverageArguments, allow_abbrev=False, description=__doc__)
    parser.add_argument("folders", nargs="+", help="The adapters' folders.")
    args, rest = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    errors = average_adapters(rest.folders, args.output, weights=args.weights, rank=args.rank)
    total = errors.pop("total")
    print(table(errors))
    print(f"relative error of all {len(errors)} layers together {total:.3f}; adapter saved to {args.output}")
    draw(errors, total, Path(args.output) / "average_error.png")
    return {**errors, "total": total}


def table(errors: dict[str, float]) -> str:
    """Return the errors by layer, the largest first."""
    width = max(len(name) for name in errors)
    ordered = sorted(errors.items(), key=lambda entry: -entry[1])
    return "\n".join([f"{'layer':<{width}}  error", *(f"{name:<{width}}  {error:.3f}" for name, error in ordered)])


def draw(errors: dict[str, float], total: float, file: Path) -> None:
    """Draw the error of each layer, in the model's order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(errors)), list(errors.values()), color="tab:blue")
    axes.axhline(total, color="tab:gray", linestyle="--", label="all layers together")
    axes.set_xlabel("layer, in the model's order")
    axes.set_ylabel("relative error of the change")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
