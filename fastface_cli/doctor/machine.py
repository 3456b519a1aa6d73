"""What this machine has: PyTorch, the CUDA it was built for, NVIDIA's driver; and whether they fit."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import FastFaceError
from . import packages as runtimes

DRIVERS = {13: "580", 12: "525", 11: "450"}
"""The first driver that serves a CUDA generation (NVIDIA's table of minor version compatibility)."""


@dataclass(frozen=True)
class Gpu:
    """One CUDA device; bytes of memory, and the compute capability as "9.0"."""

    name: str
    total: int
    free: int
    capability: str


@dataclass(frozen=True)
class Machine:
    """What was seen of the machine.

    Args:
        torch: version of PyTorch.
        cuda: version of the CUDA that PyTorch was built for, or None.
        architectures: those it was built for, as "sm_90".
        gpus: what PyTorch can use.
        driver: version of NVIDIA's driver, or None where there is none.
        driver_cuda: the newest CUDA that this driver serves.
        mps: whether Apple's GPU is there.
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
        """The CUDA that PyTorch runs with here; None: no GPU that it can use."""
        return self.cuda if self.gpus else None


def look() -> Machine:
    """Ask PyTorch and NVIDIA's driver.

    Raises:
        FastFaceError: PyTorch does not load.
    """
    try:
        import torch
    except (ImportError, OSError) as error:
        raise FastFaceError(f"PyTorch does not load: {first_line(error)}", reinstall("torch")) from error
    driver, driver_cuda = _driver()
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

    seen = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return Gpu(seen.name, total, free, f"{seen.major}.{seen.minor}")


def _driver() -> tuple[str | None, str | None]:
    """Versions of the driver and of the newest CUDA that it serves, as `nvidia-smi` tells them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None, None
    try:
        said = subprocess.run([tool], capture_output=True, text=True, check=False, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None, None
    driver = re.search(r"Driver Version:\s*([\d.]+)", said)
    cuda = re.search(r"CUDA[^:|]*Version:\s*([\d.]+)", said)
    return driver and driver[1], cuda and cuda[1]


def why_no_gpu(machine: Machine) -> tuple[str | None, str | None]:
    """Why PyTorch sees no GPU although there is a driver, and what to do; nothing where there is none."""
    if machine.driver is None:
        return None, None
    if machine.cuda is None:
        return (
            f"PyTorch {machine.torch} cannot use the GPU: it is built for the CPU",
            torch_for(machine.driver_cuda),
        )
    if machine.driver_cuda and int(machine.driver_cuda.split(".")[0]) < int(machine.cuda.split(".")[0]):
        need = DRIVERS.get(int(machine.cuda.split(".")[0]), "a newer one")
        return (
            f"driver {machine.driver} serves CUDA {machine.driver_cuda}, PyTorch {machine.torch} needs "
            f"CUDA {machine.cuda} (driver {need} or later)",
            torch_for(machine.driver_cuda),
        )
    return (
        f"driver {machine.driver} is here, but PyTorch sees no GPU: a container without its devices, "
        "CUDA_VISIBLE_DEVICES, or a driver that was replaced while it ran",
        "nvidia-smi",
    )


def served(capability: str, architectures: Sequence[str]) -> bool:
    """Whether a build runs on a GPU: the same major version and no later minor one, or code it compiles."""
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


def torch_for(cuda: str | None) -> str:
    """The command that installs a PyTorch for a driver which serves that CUDA."""
    major, minor = (int(part) for part in ((cuda or "13.0") + ".0").split(".")[:2])
    build = "cu130" if major >= 13 else "cu128" if (major, minor) >= (12, 8) else "cu126"
    return f"{_pip()} install --force-reinstall torch --index-url https://download.pytorch.org/whl/{build}"


def reinstall(package: str) -> str:
    """The command that installs a package again."""
    return f"{_pip()} install --force-reinstall {package}"


def _pip() -> str:
    try:
        return shlex.join(runtimes.installer())
    except FastFaceError:
        return "pip"


def first_line(error: BaseException) -> str:
    """What an exception says, without what follows."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
