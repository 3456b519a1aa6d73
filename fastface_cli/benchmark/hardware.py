"""On what numbers were taken: hardware, driver, versions, commit, memory."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
"""Whose versions a number depends on."""


def describe(device: torch.device) -> dict[str, Any]:
    """Everything that a reader needs to take the same numbers again."""
    import torch

    found: dict[str, Any] = {
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
        found["gpu"] = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": _cudnn(),
            **_driver(device.index or 0),
        }
    return found


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
    """The commit that a checkout stands at, with `+` where files were changed since; None outside of one."""
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return None
    head = _said(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if head is None:
        return None
    changed = _said(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return head + ("+" if changed else "")


def _cudnn() -> Any:
    import torch

    return torch.backends.cudnn.version()  # type: ignore[no-untyped-call]


def _driver(index: int) -> dict[str, str | None]:
    asked = ("driver_version", "clocks.sm", "clocks.mem", "power.limit")
    if shutil.which("nvidia-smi") is None:
        return {}
    said = _said(["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", f"--id={index}"])
    return {} if said is None else dict(zip(asked, said.split(", "), strict=False))


def _said(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def process_peak() -> int:
    """Bytes of the most memory that this process has held at once."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def device_peak(device: torch.device, *, reset: bool = False) -> dict[str, int] | None:
    """Bytes at most allocated and at most reserved on a CUDA device since the last `reset`; else None."""
    import torch

    if device.type != "cuda":
        return None
    found = {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
    }
    if reset:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return found
