"""Offload models to CPU memory, for GPUs with little memory. Each level is exact and slower than the last.

A level defines which models are on the device only while they are used. No level changes the image beyond
rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from ..errors import UsageError
from .acceleration import Acceleration

LevelName: TypeAlias = Literal["off", "12", "8", "6"]
GIB = 2**30


@dataclass(frozen=True)
class Level:
    """Which models are offloaded."""

    name: LevelName
    """Memory of the intended card in GB; `off`: nothing is offloaded."""
    encoders: bool = False
    """Text encoders, image encoder and identity projection are on the device only while they encode."""
    models: bool = False
    """UNet and VAE too: one model at a time."""
    projections: bool = False
    """The projections of keys and values are on the device only while they project."""
    one_branch: bool = False
    """Independent branches run through the UNet one after another."""
    blocks: bool = False
    """Only the active block of the UNet is on the device."""

    @property
    def moves_unet(self) -> bool:
        """Whether the UNet, or a part of it, is offloaded; then it cannot be compiled."""
        return self.models or self.projections or self.blocks


LEVELS: Mapping[LevelName, Level] = {
    "off": Level("off"),
    "12": Level("12", encoders=True),
    "8": Level("8", encoders=True, models=True, projections=True, one_branch=True),
    # All branches share one transfer of a block, because the transfer takes longer than the computation.
    "6": Level("6", encoders=True, models=True, projections=True, blocks=True),
}
"""By name, from the fastest to the smallest."""
OFF = LEVELS["off"]

PEAKS: Mapping[LevelName, float] = {"off": 10.1, "12": 7.1, "8": 4.4, "6": 2.4}
"""Peak GiB of tensors on the device: the published stack, one image of 1024x1024, half precision.
Calculated from shapes (`python benchmarks/footprint.py`), not measured."""
DECODING = 1.5
"""GiB that decoding takes for each additional 1024x1024 pixels of an image, calculated the same way."""
HEADROOM = 1.6
"""GiB in addition to tensors: CUDA's context, estimated at 0.6, and workspaces, measured at up to 1.0."""


def need(level: Level, pixels: int, *, half: bool = True) -> int:
    """Return the estimated bytes of device memory that the published stack needs.

    Args:
        level: the offload level.
        pixels: of all images of a batch.
        half: 16-bit weights instead of 32-bit ones.
    """
    tensors = PEAKS[level.name] + DECODING * max(0.0, pixels / 1024**2 - 1)
    return int((tensors * (1 if half else 2) + HEADROOM) * GIB)


def choose(free: int, pixels: int, *, half: bool = True) -> Level:
    """Return the fastest level that fits into `free` bytes, or the smallest level."""
    for level in LEVELS.values():
        if need(level, pixels, half=half) <= free:
            return level
    return level


def level_of(name: str) -> Level:
    """Return a level by its name.

    Raises:
        UsageError: unknown name.
    """
    for known, level in LEVELS.items():
        if name == known:
            return level
    raise UsageError(
        f"--low-memory '{name}' is not a level", f"choose one of {', '.join(LEVELS)} (GB of the card)"
    )


def next_smaller(level: Level) -> Level | None:
    """Return the next level, which needs less memory; None after the last one."""
    names = list(LEVELS)
    following = names[names.index(level.name) + 1 :]
    return LEVELS[following[0]] if following else None


Excluded: TypeAlias = Collection[torch.nn.Module]


@contextmanager
def visiting(device: torch.device, *modules: torch.nn.Module, without: Excluded = ()) -> Iterator[None]:
    """Keep modules on a device inside the context. Their tensors are copied there and the copies are dropped
    afterwards; the originals stay in CPU memory, so that nothing is copied back.

    Args:
        device: the device.
        modules: to move, with their submodules.
        without: submodules that are not moved.
    """
    offloaded: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    try:
        for part in (part for module in modules for part in module.modules() if part not in without):
            tables: tuple[Any, Any] = (part._parameters, part._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if tensor is not None and tensor.device != device:
                        offloaded.append((table, name, tensor))
                        table[name] = _copied(tensor, device)
        yield
    finally:
        for table, name, tensor in offloaded:
            table[name] = tensor


def _copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    # On MPS, a non-blocking copy may be read before it is complete.
    copy = tensor.detach().to(device, non_blocking=device.type == "cuda")
    return torch.nn.Parameter(copy, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else copy


@contextmanager
def in_blocks(device: torch.device, unet: torch.nn.Module, *, without: Excluded = ()) -> Iterator[None]:
    """Move each block of a UNet to the device during its call, inside the context."""
    with ExitStack() as hooks:
        for block in blocks_of(unet):
            hooks.enter_context(_visits_when_called(device, block, without))
        yield


def blocks_of(unet: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the modules of a UNet that are called one after another and together contain all its weights."""
    blocks: list[torch.nn.Module] = []
    for child in unet.children():
        blocks += list(child) if isinstance(child, torch.nn.ModuleList) else [child]
    return blocks


@contextmanager
def _visits_when_called(device: torch.device, block: torch.nn.Module, without: Excluded) -> Iterator[None]:
    active: list[AbstractContextManager[None]] = []

    def onload(*_: Any) -> None:
        visit = visiting(device, block, without=without)
        visit.__enter__()
        active.append(visit)

    def offload(*_: Any) -> None:
        active.pop().__exit__(None, None, None)

    hooks = [
        block.register_forward_pre_hook(onload),
        block.register_forward_hook(offload, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_level(level: Level, acceleration: Acceleration) -> None:
    """Check that an offload level and the optimizations can be combined.

    Raises:
        UsageError: they exclude each other.
    """
    if level.moves_unet and acceleration.compile:
        raise UsageError(
            f"--low-memory {level.name} moves the UNet, and compiled models cannot be moved",
            "omit --compile, or use --low-memory 12",
        )
    if level.projections and not acceleration.cache_kv:
        raise UsageError(
            f"--low-memory {level.name} requires keys and values that are projected once per image",
            "omit --accelerate cache_kv=off",
        )
    if level.moves_unet and not acceleration.fuse_lora:
        raise UsageError(
            f"--low-memory {level.name} requires a fused LoRA", "omit --accelerate fuse_lora=off"
        )
