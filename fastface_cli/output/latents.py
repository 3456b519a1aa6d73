"""The latents of a run as a file, for whoever compares implementations or steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_atomically

if TYPE_CHECKING:
    import torch


def save_latents(
    path: Path,
    *,
    initial_latents: torch.Tensor,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    extra: Mapping[str, torch.Tensor] | None = None,
    force: bool = False,
) -> Path:
    """Write a run's latents as float32 safetensors, whole or not at all.

    Args:
        path: the file; a missing folder is made.
        initial_latents: [images, 4, h, w], noise as scaled for the scheduler, before the first step.
        latents: [steps, images, 4, h, w], after each scheduler step.
        timesteps: [steps].
        extra: further tensors by name; they become float32 too.
        force: replace an existing file; without it a name taken meanwhile gives way to the next free one.

    Returns:
        The path that was written.

    Raises:
        ValueError: shapes that do not belong together, or an extra tensor of a name above.
        FastFaceError: the file system refuses; nothing is left behind.
    """
    import torch
    from safetensors.torch import save

    if (
        latents.ndim != 5
        or latents.shape[1:] != initial_latents.shape
        or latents.shape[:1] != timesteps.shape
    ):
        raise ValueError(
            f"latents {list(latents.shape)} do not belong to initial latents {list(initial_latents.shape)} "
            f"and timesteps {list(timesteps.shape)}"
        )
    tensors = {"initial_latents": initial_latents, "latents": latents, "timesteps": timesteps}
    for name, tensor in (extra or {}).items():
        if name in tensors:
            raise ValueError(f"'{name}' is given twice")
        tensors[name] = tensor
    # A copy each: safetensors refuses tensors that share memory, and a view would drag its base along.
    plain = {
        name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in tensors.items()
    }
    data: bytes = save(plain)
    return write_atomically(path, data, force=force)
