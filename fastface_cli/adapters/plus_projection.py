"""Load the projection of "plus" adapters: plus-face and InstantID."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from torch import Tensor

from ..quiet import loading_errors
from .faceid_plusv2 import read_adapter

HEAD_WIDTH = 64
"""Width of the attention heads, in every published file."""


def load_plus(
    pipe: StableDiffusionXLPipeline, file: Path, lora_scale: float, *, fuse: bool = True
) -> torch.nn.Module:
    """Load the keys and values of a file into the UNet of a pipeline; return its projection.

    These files have no LoRA: `lora_scale` and `fuse` have no effect.

    Raises:
        ModelUnavailableError: the file has another layout.
    """
    with loading_errors("identity adapter", file):
        read_adapter(pipe, file)
        unet: Any = pipe.unet
        projection = unet.encoder_hid_proj.image_projection_layers[0]
        if not isinstance(projection, IPAdapterPlusImageProjection):
            raise ValueError("it has no projection with the layout of plus-face or InstantID")
        unet.encoder_hid_proj = None
        module: torch.nn.Module = projection.eval()
        return module


def empty_plus(state: Mapping[str, Tensor]) -> torch.nn.Module:
    """Create the projection on the meta device, with the shapes of a state."""
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    hidden, features = state["proj_in.weight"].shape
    with torch.device("meta"):
        projection: torch.nn.Module = IPAdapterPlusImageProjection(
            embed_dims=features,
            output_dims=state["proj_out.weight"].shape[0],
            hidden_dims=hidden,
            depth=depth,
            dim_head=HEAD_WIDTH,
            heads=state["layers.0.attn.to_q.weight"].shape[0] // HEAD_WIDTH,
            num_queries=state["latents"].shape[1],
        )
    return projection
