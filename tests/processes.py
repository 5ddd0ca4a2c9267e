"""The recipes' end of a program of several processes, for the programs that tests start."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parents[1] / "recipes"))

from finetuning.processes import end_processes as end_processes
