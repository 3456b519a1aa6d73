"""Read NVIDIA's driver through NVML (nvidia-ml-py), which works even when PyTorch cannot use the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any


@contextmanager
def open_nvml() -> Iterator[Any]:
    """Yield the initialized `pynvml` module, or None without nvidia-ml-py or without a driver."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def nvml_installed() -> bool:
    """Return whether nvidia-ml-py is installed: without it, the driver cannot be checked."""
    return find_spec("pynvml") is not None


def driver_versions() -> tuple[str | None, str | None]:
    """Return the version of the driver and of the newest CUDA it supports; None where unknown."""
    with open_nvml() as nvml:
        if nvml is None:
            return None, None
        try:
            driver = _text(nvml.nvmlSystemGetDriverVersion())
            cuda = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
        except nvml.NVMLError:
            return None, None
    return driver, f"{cuda // 1000}.{cuda % 1000 // 10}"


def gpu_state(index: int) -> dict[str, str]:
    """Return a GPU's driver, clocks and power limit, under the names that nvidia-smi uses."""
    with open_nvml() as nvml:
        if nvml is None:
            return {}
        try:
            gpu = nvml.nvmlDeviceGetHandleByIndex(index)
            return {
                "driver_version": _text(nvml.nvmlSystemGetDriverVersion()),
                "clocks.sm": f"{nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)} MHz",
                "clocks.mem": f"{nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM)} MHz",
                "power.limit": f"{nvml.nvmlDeviceGetPowerManagementLimit(gpu) / 1000:.2f} W",
            }
        except nvml.NVMLError:
            return {}


def _text(value: str | bytes) -> str:
    """Decode a string of NVML, which older releases of nvidia-ml-py return as bytes."""
    return value.decode() if isinstance(value, bytes) else value
