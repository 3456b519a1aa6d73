"""Where and how models run: device, dtype, offload level and acceleration, resolved once per stack."""

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
"""A stack with more bytes of weights runs on a CPU only where the CPU is named explicitly."""


@dataclass(frozen=True)
class Runtime:
    """What the caller asks for; None takes the setting of this machine."""

    device: str | None = None
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps`."""
    dtype: str | None = None
    """`float32`, `float16` or `bfloat16`; None chooses by device."""
    offload: Saving | None = None
    """`off`, `12`, `8` or `6` (GB of the card), or `auto`."""
    acceleration: Acceleration = DEFAULT

    def resolve(self, recipe: Recipe, settings: Settings) -> ResolvedRuntime:
        """Check the choices against this machine and a recipe, before any model is loaded.

        Raises:
            DeviceError: there is no such device, or a full-size stack and no GPU.
            UsageError: there is no such dtype, or two choices exclude each other.
        """
        from ..models.acceleration import check
        from ..models.device import pick_device, pick_dtype
        from ..models.offload import LEVELS
        from .pipeline import check_level

        device = pick_device(check_device(recipe, self.device or settings.device))
        dtype = pick_dtype(self.dtype, device)
        check(self.acceleration, device, dtype)
        offload: Saving = self.offload or settings.low_memory
        if offload != "auto":
            check_level(LEVELS[offload], self.acceleration)
        return ResolvedRuntime(device, dtype, offload, self.acceleration)


@dataclass(frozen=True)
class ResolvedRuntime:
    """A runtime that this machine can provide."""

    device: torch.device
    dtype: torch.dtype
    offload: Saving
    acceleration: Acceleration

    def level(self, recipe: Recipe) -> Level:
        """The offload level; `auto` looks at the free memory of the card when the models are loaded."""
        import torch

        from ..models.offload import GIB, LEVELS, OFF, choose

        if self.offload != "auto":
            return LEVELS[self.offload]
        if self.device.type != "cuda" or not is_full_size(recipe):
            return OFF
        free, _ = torch.cuda.mem_get_info(self.device)
        sampling = recipe.sampling
        level = choose(free, sampling.width * sampling.height, half=self.dtype.itemsize == 2)
        if level.moves_unet and self.acceleration.compile:
            level = LEVELS["12"]  # the smallest level that leaves the UNet in place
        if level is not OFF:
            log.warning(
                "%.1f GiB of the card are free: using --low-memory %s, which gives the same image more "
                "slowly; --low-memory off keeps all models on the card",
                free / GIB,
                level.name,
            )
        return level


def is_full_size(recipe: Recipe) -> bool:
    """Whether a recipe's stack is as large as SDXL, unlike the pocket stack."""
    return sum(artifact.bytes for artifact in artifacts_of(recipe).values()) > GPU_BYTES


def check_device(recipe: Recipe, device: str) -> str:
    """The name of the device to run on; needs no model.

    Raises:
        DeviceError: there is no such device, or a full-size stack and no GPU.
    """
    from ..models.device import pick_device

    chosen = pick_device(device)
    if device == "auto" and chosen.type == "cpu" and is_full_size(recipe):
        raise DeviceError(
            f"recipe '{recipe.name}' needs a GPU, and this machine has no CUDA device",
            "--recipe pocket runs on any machine; --device cpu runs this one anyway (slow, 24 GB of memory)",
        )
    return str(chosen)
