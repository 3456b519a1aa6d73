"""Choose the device and the dtype, and report errors of memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import DeviceError, UsageError
from ..quiet import is_out_of_memory
from .offload import OFF, Level, next_smaller

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """Return the device to run on.

    Args:
        name: `auto` (CUDA, then MPS, then the CPU) or a torch device name.

    Raises:
        DeviceError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"'{name}' is not a device", "use auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError("this machine has no CUDA device", "try --device cpu, or --recipe pocket")
        if (device.index or 0) >= torch.cuda.device_count():
            raise DeviceError(
                f"this machine has no {device}; it has {torch.cuda.device_count()} CUDA devices"
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("this machine has no MPS device", "try --device cpu, or --recipe pocket")
    elif device.type not in ("cpu", "mps"):
        raise UsageError(f"device '{name}' is not supported", "use auto, cpu, cuda, cuda:1 or mps")
    return device


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; None is float16 on a GPU and float32 on a CPU."""
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.float16
    if name not in DTYPES:
        raise UsageError(f"dtype '{name}' is not supported", f"use one of {', '.join(DTYPES)}")
    return DTYPES[name]


@contextmanager
def memory_errors(device: torch.device, level: Level = OFF) -> Iterator[None]:
    """Turn running out of memory into a DeviceError that names the next offload level."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        smaller = next_smaller(level)
        hint = "try a smaller --size, --batch-size 1 or --dtype float16"
        if smaller is not None and device.type != "cpu":
            hint = f"try --low-memory {smaller.name}, which gives the same image more slowly; or {hint[4:]}"
        raise DeviceError(f"out of memory on {device}", hint) from error
