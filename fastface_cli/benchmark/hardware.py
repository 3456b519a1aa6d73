"""Describe the machine that a benchmark runs on: hardware, driver, versions, commit, memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..doctor.nvidia import gpu_state

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "fastface-cli",
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "torchao",
    "onnxruntime",
    "numpy",
    "pillow",
)
"""Packages whose versions affect the measurements."""


def describe(device: torch.device) -> dict[str, Any]:
    """Return everything a reader needs to reproduce the measurements."""
    import torch

    description: dict[str, Any] = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": str(device),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit(Path(__file__).resolve().parents[2]),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        description["gpu"] = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": _cudnn(),
            **gpu_state(device.index or 0),
        }
    return description


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit(folder: Path) -> str | None:
    """Return the commit of a checkout, with `+` if files have changed since; None outside a checkout."""
    if not (folder / ".git").exists():
        return None
    head = _git(folder, "rev-parse", "HEAD")
    if head is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return head + ("+" if changed else "")


def _cudnn() -> Any:
    import torch

    return torch.backends.cudnn.version()  # type: ignore[no-untyped-call]


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def process_peak() -> int:
    """Return the peak memory of this process in bytes."""
    if os.name == "nt":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def device_peak(device: torch.device, *, reset: bool = False) -> dict[str, int] | None:
    """Return the peak bytes allocated and reserved on a CUDA device since the last `reset`; else None."""
    import torch

    if device.type != "cuda":
        return None
    peak = {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
    }
    if reset:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return peak
