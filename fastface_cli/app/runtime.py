"""Where and how models run: device, dtype, offload level and acceleration."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import DeviceError
from ..models.acceleration import DEFAULT, Acceleration
from ..settings import Saving, Settings
from .licensing import artifacts_of

if TYPE_CHECKING:
    import torch

    from ..models.offload import Level
    from ..recipe.schema import Recipe

log = logging.getLogger(__name__)

GPU_BYTES = 1_000_000_000
"""Models with more bytes of weights run on a CPU only on explicit request."""


@dataclass(frozen=True)
class Runtime:
    """The choices of the caller; None is the setting of this machine."""

    device: str | None = None
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps`."""
    dtype: str | None = None
    """`float32`, `float16` or `bfloat16`; None depends on the device."""
    offload: Saving | None = None
    """`off`, `12`, `8` or `6` (GB of GPU memory), or `auto`."""
    acceleration: Acceleration = DEFAULT

    def resolve(self, recipe: Recipe, settings: Settings) -> ResolvedRuntime:
        """Check the choices against this machine and a recipe, before any model is loaded.

        Raises:
            DeviceError: the device does not exist, or a full-size recipe has no GPU.
            UsageError: the dtype is unknown, or two choices exclude each other.
        """
        from ..models.acceleration import check
        from ..models.device import pick_device, pick_dtype
        from ..models.offload import LEVELS, check_level

        device = pick_device(check_device(recipe, self.device or settings.device))
        dtype = pick_dtype(self.dtype, device)
        check(self.acceleration, device, dtype)
        offload: Saving = self.offload or settings.low_memory
        if offload != "auto":
            check_level(LEVELS[offload], self.acceleration)
        return ResolvedRuntime(device, dtype, offload, self.acceleration)


@dataclass(frozen=True)
class ResolvedRuntime:
    """A runtime that this machine supports."""

    device: torch.device
    dtype: torch.dtype
    offload: Saving
    acceleration: Acceleration

    def level(self, recipe: Recipe) -> Level:
        """The offload level; `auto` depends on the free memory of the GPU now."""
        import torch

        from ..models.offload import GIB, LEVELS, OFF, choose

        if self.offload != "auto":
            return LEVELS[self.offload]
        if self.device.type != "cuda" or not is_full_size(recipe):
            return OFF
        free, _ = torch.cuda.mem_get_info(self.device)
        # The sizes of the levels are FaceID's. A ControlNet comes on top; PuLID's image tower (0.3 billion
        # numbers in float32) takes the place of FaceID's (0.6 billion in half precision).
        free -= sum(artifact.bytes for role, artifact in artifacts_of(recipe).items() if role == "controlnet")
        sampling = recipe.sampling
        level = choose(free, sampling.width * sampling.height, half=self.dtype.itemsize == 2)
        if level.moves_unet and self.acceleration.compile:
            level = LEVELS["12"]  # the smallest level that leaves the UNet in place
        if level is not OFF:
            log.warning(
                "the GPU has %.1f GiB of free memory: using --low-memory %s, which is slower and gives the "
                "same image; --low-memory off keeps all models on the GPU",
                free / GIB,
                level.name,
            )
        return level


def is_full_size(recipe: Recipe) -> bool:
    """Whether the models of a recipe are as large as SDXL, unlike the pocket stack."""
    return sum(artifact.bytes for artifact in artifacts_of(recipe).values()) > GPU_BYTES


def check_device(recipe: Recipe, device: str) -> str:
    """Choose the device, before any model is loaded.

    Raises:
        DeviceError: the device does not exist, or a full-size recipe has no GPU.
    """
    from ..models.device import pick_device

    chosen = pick_device(device)
    if device == "auto" and chosen.type == "cpu" and is_full_size(recipe):
        raise DeviceError(
            f"recipe '{recipe.name}' needs a GPU, and this machine has no CUDA device",
            "--recipe pocket runs on any machine; --device cpu runs this one anyway (slow, 24 GB of memory)",
        )
    return str(chosen)
