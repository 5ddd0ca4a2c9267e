"""
Run a generated program inside a fence: a process of its own with limits on time, memory, files and processes.

It is a fence and no jail. It stops what a language model writes by accident or copies from a bad example: endless
loops, memory and fork bombs, writing to files, the network. The kernel's limits and Python itself keep it, and a
program that was written to break out of Python can do so. Run untrusted models on a machine that you can lose.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


CHILD = Path(__file__).resolve().with_name("fence_child.py")


@dataclass
class Outcome:
    """Say whether a program ended by itself, or why it did not, and which parts of the fence the kernel kept."""

    passed: bool
    reason: str
    own_network: bool = False
    no_children: bool = False


def run_fenced(sources: list[str], timeout: float = 5.0, memory_mb: int = 1024) -> Outcome:
    """
    Run Python sources one after the other in one namespace, inside the fence.

    Args:
        sources (`list[str]`): compiled apart, so that none can swallow the next in an unclosed string.
        timeout (`float`): seconds until the process and its group are killed.
        memory_mb (`int`): MiB of address space that the process may have.

    Returns:
        `Outcome`: `passed` if every source ran to its end. Only then does the process say the word that it was told in
            secret; what the program prints, and the status that it exits with, count for nothing.
    """
    token = secrets.token_hex(16)
    request = {"token": token, "sources": sources, "cpu_seconds": int(timeout) + 1, "memory_mb": memory_mb}
    with (
        tempfile.TemporaryDirectory(prefix="fence_", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as told,
        tempfile.TemporaryFile() as said,  # a file, whose size is limited, where a pipe could be flooded
    ):
        told.write(json.dumps(request).encode("utf-8"))
        told.seek(0)
        process = subprocess.Popen(
            # isolated, without site packages, without writing bytecode
            [sys.executable, "-I", "-S", "-B", str(CHILD)],
            stdin=told,
            stdout=said,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            in_time = _wait(process.pid, timeout)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # the group is there until its leader is reaped below
            status = process.wait()
        said.seek(0)
        word = said.read(400).decode("utf-8", "replace")
    secret, _, kept = word.partition(" ")
    if secret == token and in_time:
        own_network, no_children = (part == "1" for part in kept.split())
        return Outcome(True, "passed", own_network, no_children)
    if not in_time:
        return Outcome(False, f"killed after {timeout:g} s")
    return Outcome(False, word.replace(token, "") or f"ended with status {status} before its tests did")


def check_fence(timeout: float, memory_mb: int) -> str:
    """
    Try the fence on programs whose outcome is known, and say in words what keeps it.

    Raises:
        `RuntimeError`: if a harmless program fails in it, or one that should be stopped is not.
    """
    if os.name != "posix":
        raise RuntimeError(f"the fence needs the limits of a POSIX system, and this is {os.name!r}. Use Linux.")
    harmless = "import math, re, typing, itertools, collections, functools, heapq, hashlib"
    good = run_fenced([harmless], timeout, memory_mb)
    if not good.passed:
        raise RuntimeError(
            f"a harmless program fails inside the fence ({good.reason}): more than timeout={timeout:g} and "
            f"memory_mb={memory_mb} may be needed, or {sys.executable} does not start without its environment."
        )
    for what, source in {
        "the network": "import socket\nsocket.socket()",
        "other processes": "import os\nos.fork()",
        "files": f"open({str(CHILD)!r}, 'a')",
        "memory": f"x = bytearray({memory_mb + 1} * 2**20)",
    }.items():
        if run_fenced([source], timeout, memory_mb).passed:
            raise RuntimeError(f"the fence does not keep a program from {what} on this system. Nothing is run.")
    network = "a network of its own" if good.own_network else "no sockets (Python refuses them; the kernel would not)"
    processes = "no processes" if good.no_children else "no processes (Python refuses them; the kernel would not)"
    return f"{timeout:g} s, {memory_mb} MiB, {network}, {processes}, no writing outside its folder"


def _wait(pid: int, timeout: float) -> bool:
    """Wait until a process has ended, without reaping it, or until the time is over; say which."""
    end = time.monotonic() + timeout
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
