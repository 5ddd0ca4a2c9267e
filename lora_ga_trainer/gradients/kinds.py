"""Kinds of objects, by what a walk over state may do with them."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import multiprocessing.connection
import multiprocessing.process
import multiprocessing.queues
import queue
import socket
import sys
import threading
import types
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler


ATOMS = (type(None), bool, int, float, complex, str, bytes, range, slice, torch.dtype, torch.device)
# What a training run is made of. `borrow` gives back what it changes of these.
CLOSED = (
    type, types.ModuleType, types.CodeType, nn.Parameter, logging.Logger, Trainer, TrainerCallback, CallbackHandler,
    TrainingArguments, PreTrainedTokenizerBase, Accelerator, AcceleratorState, GradientState, PartialState,
    torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, threading.Thread,
    multiprocessing.process.BaseProcess, concurrent.futures.Executor,
)  # fmt: skip
# They hand over once what another thread, process or machine sends.
SENT = (
    queue.Queue, queue.SimpleQueue, multiprocessing.queues.Queue, multiprocessing.queues.SimpleQueue,
    multiprocessing.connection._ConnectionBase, socket.socket,
)  # fmt: skip
CALLABLES = (types.FunctionType, types.MethodType, functools.partial, property, staticmethod, classmethod)
# Objects of these packages stand for memory, processes and connections that only they know how to handle.
_ENGINES = (
    "accelerate.hooks", "accelerate.utils", "aqlm.", "auto_gptq.", "awq.", "bitsandbytes.", "compressed_tensors.",
    "deepspeed.", "eetq.", "fbgemm_gpu.", "gptqmodel.", "hqq.", "mlflow.", "optimum.", "torch._",
    "torch.distributed.", "torch.nn.parallel.", "torchao.", "trackio.", "transformer_engine.", "vllm.", "wandb.",
)  # fmt: skip
# The code of these packages keeps no state of a user's. Objects of their classes may.
_KNOWN = sys.stdlib_module_names | {
    "accelerate", "datasets", "lora_ga_trainer", "numpy", "pandas", "peft", "pyarrow", "pytest", "_pytest",
    "tokenizers", "torch", "tqdm", "transformers",
}  # fmt: skip


def is_of_engine(code: Any) -> bool:
    """Tell whether a class or a function is of a package whose state is only its own to change."""
    return f"{code.__module__}.".startswith(_ENGINES)


def is_known(code: Any) -> bool:
    """Tell whether a class or a function is of a package that keeps no state of a user's in its code."""
    return str(getattr(code, "__module__", "")).partition(".")[0] in _KNOWN
