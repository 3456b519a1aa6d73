"""Save the latents of a run, to compare implementations or steps."""

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
    """Write the latents of a run as float32 safetensors, atomically.

    Args:
        path: the file; missing folders are created.
        initial_latents: [images, 4, h, w], noise as scaled for the scheduler, before the first step.
        latents: [steps, images, 4, h, w], after each scheduler step.
        timesteps: [steps].
        extra: more tensors by name, also converted to float32.
        force: replace an existing file; otherwise a name taken meanwhile becomes the next free name.

    Returns:
        The path that was written.

    Raises:
        ValueError: the shapes do not match, or an extra tensor has a name of the above.
        FastFaceError: the file cannot be written; no partial file remains.
    """
    import torch
    from safetensors.torch import save

    if (
        latents.ndim != 5
        or latents.shape[1:] != initial_latents.shape
        or latents.shape[:1] != timesteps.shape
    ):
        raise ValueError(
            f"latents {list(latents.shape)} do not match initial latents {list(initial_latents.shape)} "
            f"and timesteps {list(timesteps.shape)}"
        )
    tensors = {"initial_latents": initial_latents, "latents": latents, "timesteps": timesteps}
    for name, tensor in (extra or {}).items():
        if name in tensors:
            raise ValueError(f"'{name}' is given twice")
        tensors[name] = tensor
    # Copies, because safetensors refuses tensors that share memory, and a view would save its whole base.
    plain = {
        name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in tensors.items()
    }
    data: bytes = save(plain)
    return write_atomically(path, data, force=force)
