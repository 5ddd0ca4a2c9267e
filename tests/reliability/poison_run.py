"""Two processes of which one goes wrong in the probe; each writes down what it met."""

import os
import sys
from pathlib import Path

import torch
from processes import end_processes
from test_poison import make, rows


def run(case: str, folder: Path) -> str:
    def act(outputs, loss):
        if case == "error":
            raise LookupError("on process 1 alone")
        return loss * torch.nan

    if case == "short":
        data, batch_size = rows(poisoned=None)[:5], 2
    else:
        data, batch_size = rows(poisoned=13), 4  # process 1's, in the second round
    trainer = make(folder / case, act, train_dataset=data, batch_size=batch_size)
    try:
        trainer.train()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return f"started, {trainer.lora_ga_report.samples} samples"


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    met = [f"{case}: {run(case, folder)}" for case in ("nan", "error", "short")]
    (folder / f"rank_{os.environ['RANK']}").write_text("\n".join(met))


if __name__ == "__main__":
    main()
    end_processes()
