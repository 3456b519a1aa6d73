"""Describe this machine: PyTorch, the CUDA version it was built for, and NVIDIA's driver."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import FastFaceError
from . import packages
from .nvidia import driver_versions, nvml_installed
from .shell import shell_line

DRIVERS = {13: "580", 12: "525", 11: "450"}
"""The oldest driver for each CUDA major version (NVIDIA's table of minor version compatibility)."""


@dataclass(frozen=True)
class Gpu:
    """One CUDA device; memory in bytes, and the compute capability such as "9.0"."""

    name: str
    total: int
    free: int
    capability: str


@dataclass(frozen=True)
class Machine:
    """The software and hardware that the checks depend on.

    Args:
        torch: version of PyTorch.
        cuda: CUDA version that PyTorch was built for, or None.
        architectures: GPU architectures that PyTorch was built for, such as "sm_90".
        gpus: GPUs that PyTorch can use.
        driver: version of NVIDIA's driver, or None if unknown.
        driver_cuda: newest CUDA version that this driver supports.
        mps: whether Apple's GPU is available.
    """

    torch: str
    cuda: str | None = None
    architectures: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    driver_cuda: str | None = None
    mps: bool = False

    @property
    def cuda_in_use(self) -> str | None:
        """The CUDA version that PyTorch uses here; None if it can use no GPU."""
        return self.cuda if self.gpus else None


def inspect_machine() -> Machine:
    """Query PyTorch and NVIDIA's driver.

    Raises:
        FastFaceError: PyTorch cannot be imported.
    """
    try:
        import torch
    except (ImportError, OSError) as error:
        raise FastFaceError(
            f"PyTorch cannot be imported: {first_line(error)}", reinstall_command("torch")
        ) from error
    driver, driver_cuda = driver_versions()
    gpus: tuple[Gpu, ...] = ()
    architectures: tuple[str, ...] = ()
    if torch.cuda.is_available():
        gpus = tuple(_gpu(index) for index in range(torch.cuda.device_count()))
        architectures = tuple(torch.cuda.get_arch_list())
    return Machine(
        torch=str(torch.__version__),
        cuda=torch.version.cuda,
        architectures=architectures,
        gpus=gpus,
        driver=driver,
        driver_cuda=driver_cuda,
        mps=torch.backends.mps.is_available(),
    )


def _gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return Gpu(properties.name, total, free, f"{properties.major}.{properties.minor}")


def explain_missing_gpu(machine: Machine) -> tuple[str | None, str | None]:
    """Return why PyTorch sees no GPU, and the command that fixes it; None where unknown."""
    if machine.driver is None:
        if machine.cuda is not None and not nvml_installed():
            return (
                "there is no CUDA device here, and the NVIDIA driver was not checked: "
                "nvidia-ml-py is not installed",
                install_command("nvidia-ml-py"),
            )
        return None, None
    if machine.cuda is None:
        return (
            f"PyTorch {machine.torch} cannot use the GPU: it is built for the CPU",
            torch_install_command(machine.driver_cuda),
        )
    if machine.driver_cuda and int(machine.driver_cuda.split(".")[0]) < int(machine.cuda.split(".")[0]):
        required = DRIVERS.get(int(machine.cuda.split(".")[0]), "a newer one")
        return (
            f"driver {machine.driver} supports CUDA {machine.driver_cuda}, PyTorch {machine.torch} requires "
            f"CUDA {machine.cuda} (driver {required} or later)",
            torch_install_command(machine.driver_cuda),
        )
    return (
        f"driver {machine.driver} is installed, but PyTorch sees no GPU: check that the container has access "
        "to the GPU, that CUDA_VISIBLE_DEVICES is correct, and reboot if the driver was just updated",
        "nvidia-smi",
    )


def supports_gpu(capability: str, architectures: Sequence[str]) -> bool:
    """Return whether a PyTorch build runs on a GPU.

    It does if it has code for the same major version and no later minor version, or code that the driver
    can compile for this GPU.
    """
    major, minor = (int(part) for part in capability.split("."))
    for architecture in architectures:
        kind, _, digits = architecture.partition("_")
        number = re.match(r"\d+", digits)
        if number is None:
            continue
        value = int(number[0])
        if kind == "compute" and value <= major * 10 + minor:
            return True
        if kind == "sm" and value // 10 == major and value % 10 <= minor:
            return True
    return not architectures


def torch_install_command(cuda: str | None) -> str:
    """Return the command that installs a PyTorch build for a driver that supports this CUDA version."""
    major, minor = (int(part) for part in ((cuda or "13.0") + ".0").split(".")[:2])
    build = "cu130" if major >= 13 else "cu128" if (major, minor) >= (12, 8) else "cu126"
    return f"{reinstall_command('torch')} --index-url https://download.pytorch.org/whl/{build}"


def reinstall_command(package: str) -> str:
    """Return the command that installs a package again."""
    return install_command(f"--force-reinstall {package}")


def install_command(package: str) -> str:
    """Return the command that installs a package into this environment."""
    try:
        tool = packages.installer()
    except FastFaceError:
        tool = ["pip"]
    # uv would otherwise look for an environment near the current folder.
    target = ["--python", sys.executable] if tool[-2:] == [tool[0], "pip"] else []
    return shell_line([*tool, "install", *target, *package.split()])


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
