"""The most memory that a stretch of a program held."""

from pathlib import Path

import torch


class PeakMemory:
    """
    The peak since this was made: allocated on the GPU where there is one, resident in the process elsewhere.

    The peak of a process can be set back on Linux only. Where it can't be, nothing is known.
    """

    def __init__(self) -> None:
        self.known = True
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to what is resident now
        except OSError:
            self.known = False

    def bytes(self) -> int | None:
        """Return the peak in bytes, `None` where it can't be known."""
        if not self.known:
            return None
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
