"""The identity adapters that fastface knows: one entry each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .base import IdentityAdapter
from .faceid_plusv2 import FaceIDPlusV2, load_adapter


@dataclass(frozen=True)
class AdapterKind:
    """How an adapter is loaded."""

    load: Callable[..., torch.nn.Module]
    """(pipeline of the base, file, lora_scale, fuse=...): put the attention weights into the UNet and return
    the projection, which runs once per image."""
    build: Callable[[Any, torch.nn.Module], IdentityAdapter]
    """(pipeline of the base, projection): the adapter."""


ADAPTERS = {
    "faceid-plusv2": AdapterKind(
        load_adapter, lambda parts, projection: FaceIDPlusV2(parts.image_encoder, projection)
    ),
}

DEFAULT_ADAPTER = "faceid-plusv2"
"""The kind of every adapter file of today's recipes."""
