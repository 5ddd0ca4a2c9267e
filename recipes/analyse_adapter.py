"""
Tell what training did to each weight under an adapter, and scale its intruder dimensions down if asked to.

    python recipes/analyse_adapter.py outputs/quickstart
    python recipes/analyse_adapter.py outputs/quickstart --remove outputs/mended --strength 0.75

One weight of the base is in memory at a time. Printed are one line a layer and a summary; the report and its picture
go into the adapter's folder.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finetuning.json_reading import read_json
from finetuning.package_paths import resolve_reference
from huggingface_hub import snapshot_download
from transformers import HfArgumentParser

from lora_ga_trainer import AdapterReport, analyse_adapter, remove_intruders


@dataclass
class AnalysisArguments:
    """Say what is looked at, and where the report goes."""

    base: str | None = field(
        default=None, metadata={"help": "Folder or hub name of the base, by default the one that the adapter names."}
    )
    probe_file: str | None = field(
        default=None, metadata={"help": "Probe file of the run, for the share of the change in its directions."}
    )
    k: int = field(
        default=10,
        metadata={"help": "Strongest directions that are looked at for intruders; 0 leaves the base alone."},
    )
    eps: float = field(
        default=0.5, metadata={"help": "A direction less similar than this to all of the base's is an intruder."}
    )
    remove: str | None = field(default=None, metadata={"help": "Folder of an adapter with intruders scaled down."})
    strength: float = field(default=0.75, metadata={"help": "With --remove: what remains of an intruder, 0 to 1."})
    device: str | None = field(default=None, metadata={"help": "Where to compute: cpu, cuda. Default: cpu."})


def main(argv: list[str] | None = None) -> AdapterReport:
    parser = HfArgumentParser(AnalysisArguments, allow_abbrev=False, description=__doc__)
    parser.add_argument("folder", help="The adapter's folder.")
    args, rest = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    folder = Path(rest.folder)
    base = None if args.k == 0 else find_base(args.base, folder)
    settings = {"k": args.k, "eps": args.eps, "device": args.device}

    report = analyse_adapter(base, folder, probe_file=args.probe_file, **settings)
    print(report.table())
    print(report.summary())
    report.to_json(folder / "adapter_report.json")
    report.plot(folder / "adapter_report.png")
    print(f"report written to {folder / 'adapter_report.json'} and adapter_report.png")

    if args.remove is not None:
        remove_intruders(base, folder, args.remove, strength=args.strength, **settings)
        print(f"{report.intruders} intruders scaled to {args.strength:g}; adapter saved to {args.remove}")
    return report


def find_base(name: str | None, folder: Path) -> str:
    """Return the folder of a base, from the hub if it is not on this machine."""
    if name is None:
        config = read_json(folder / "adapter_config.json", "the config of an adapter", "Point to an adapter's folder.")
        name = config.get("base_model_name_or_path") if isinstance(config, dict) else None
        if name is None:
            raise ValueError(f"{folder} does not name its base. Say which it is: --base FOLDER.")
    name = resolve_reference(name)
    return name if Path(name).is_dir() else snapshot_download(name, allow_patterns=["*.safetensors", "*.json"])


if __name__ == "__main__":
    main()
