"""The end of a program of several processes."""

import time

from accelerate import PartialState
from torch import distributed


def end_processes(seconds: float = 1.0) -> None:
    """
    Leave the process group. It is the last call of a program, and does nothing where there is one process.

    Args:
        seconds (defaults to 1.0): how long threads that still hold tensors have to let go of them.
    """
    if not distributed.is_initialized():
        return
    PartialState().destroy_process_group()
    # DistributedDataParallel keeps gloo's threads alive beyond that (torch 2.13). A thread that is about to drop a
    # tensor needs the interpreter's lock, and if the interpreter ends just then, the program is aborted: "terminate
    # called without an active exception". While this thread sleeps the lock is free.
    time.sleep(seconds)
