"""Look at every checkpoint: what has training done to the weights so far?"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..adapters.find import find_lora_layers
from ..adapters.host import require_adapter
from ..engines.parameters import is_sharded
from ..saving.adapter_folder import AdapterFolder
from ..starts.tracking import publish
from .analyse import analyse_adapter, require_settings
from .directions import StartDirections
from .report import AdapterReport


if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

REPORT_NAME = "adapter_report.json"
PICTURE_NAME = "train/lora_ga/adapter"


class AdapterAnalysisCallback(TrainerCallback):
    """
    Analyse the adapter of every checkpoint, and send the figures to the log and the trackers.

        trainer.add_callback(AdapterAnalysisCallback(trainer))

    The figures are those of [`analyse_adapter`], under `lora_ga/adapter_...`; trackers that take pictures get one. The
    whole report goes into the checkpoint's folder, `adapter_report.json`. The base is the model in memory, so it
    may be quantised or sharded; where it is sharded all processes read the folder. What can't be analysed is one
    warning, and training goes on.

    Training waits meanwhile: seconds on a small model. On a large one leave intruders out with `k=0`, and look for
    them in a finished folder.

    Args:
        trainer: the trainer that the callback is added to.
        k, eps, probe_file: see [`analyse_adapter`].

    Attributes:
        reports (`dict[int, AdapterReport]`): by the step of the checkpoint.

    Raises:
        `ValueError`: if `k` or `eps` is impossible.
    """

    def __init__(
        self, trainer: Trainer, *, k: int = 10, eps: float = 0.5, probe_file: str | os.PathLike[str] | None = None
    ) -> None:
        require_settings("AdapterAnalysisCallback", k, eps, least=0)
        self.trainer, self.k, self.eps, self.probe_file = trainer, k, eps, probe_file
        self.reports: dict[int, AdapterReport] = {}
        self._failed = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._failed:
            return
        trainer, step = self.trainer, state.global_step
        model = trainer.accelerator.unwrap_model(trainer.model)
        name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
        try:
            # Every process takes part where weights have to be gathered, the first one alone elsewhere.
            gathers = self.k > 0 and any(is_sharded(layer.weight) for layer in find_lora_layers(model))
            if not gathers and not trainer.is_world_process_zero():
                return
            if gathers:
                trainer.accelerator.wait_for_everyone()  # the first one has written the files then
            folder = require_adapter(model).place(Path(args.output_dir) / name)
            if gathers:
                # All begin or none does: a process that raised alone would leave the others waiting for its parts.
                fault = next(filter(None, gather_object([self._fault(folder)])), None)
                if fault is not None:
                    raise ValueError(f"{fault} The base is in parts, so every process has to read these files.")
            report = analyse_adapter(
                model if self.k else None, folder, probe_file=self.probe_file, k=self.k, eps=self.eps
            )
        except ValueError as error:
            self._failed = True
            logger.warning("AdapterAnalysisCallback: training goes on without an analysis. %s", error)
            return
        self.reports[step] = report
        publish(trainer, report, name=f"{name}/{REPORT_NAME}", picture=PICTURE_NAME)

    def _fault(self, folder: Path) -> str | None:
        """Say what keeps this process from reading the files of an analysis."""
        try:
            StartDirections(AdapterFolder(folder, "AdapterAnalysisCallback"), self.probe_file)
        except (ValueError, OSError) as error:
            return str(error)
        return None
