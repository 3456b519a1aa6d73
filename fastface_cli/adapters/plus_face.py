"""IP-Adapter plus-face: the face crop alone gives sixteen identity tokens; no face recognizer is involved."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import CLIPImageProcessorPil

from ..recipe.schema import Adapter
from .base import DecoupledAdapter, OnDevice
from .faceid_plusv2 import crop_features, crop_processor

if TYPE_CHECKING:
    from ..identity.identity import Identity


@dataclass
class PlusFace(DecoupledAdapter):
    """The adapter's encoders; its keys and values are in the UNet."""

    image_encoder: torch.nn.Module
    projection: torch.nn.Module
    """From image features to identity tokens."""
    crop_order: str = "rgb"
    num_tokens: int = 16
    processor: CLIPImageProcessorPil = field(init=False)

    def __post_init__(self) -> None:
        self.processor = crop_processor(self.image_encoder)

    def configured(self, settings: Adapter) -> PlusFace:
        """See `IdentityAdapter`."""
        return replace(self, crop_order=settings.crop_order)

    def tokens(self, identity: Identity, on_device: OnDevice) -> tuple[Tensor, Tensor]:
        """Encode no identity (a zero image) and a person: [16, width] each."""
        features = crop_features(identity, self.image_encoder, self.processor, self.crop_order, on_device)
        projection: Any = self.projection
        with on_device(projection):
            tokens = projection(features)
        return tokens[0], tokens[1]
