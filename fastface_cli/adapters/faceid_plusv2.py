"""IP-Adapter FaceID-PlusV2: a face embedding and a face crop give four identity tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.embeddings import IPAdapterFaceIDPlusImageProjection
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

from ..quiet import loading_errors
from ..recipe.schema import Adapter
from .base import DecoupledAdapter, OnDevice
from .lora import fuse_loaded

if TYPE_CHECKING:
    from ..identity.identity import Identity

HEAD_WIDTH = 64
"""Width of the attention heads of the identity projection, in every FaceID-PlusV2 file."""
LORA = "faceid_0"
"""diffusers' name for the LoRA inside the adapter file."""


@dataclass
class FaceIDPlusV2(DecoupledAdapter):
    """The adapter's encoders; its keys and values are in the UNet."""

    image_encoder: torch.nn.Module
    projection: torch.nn.Module
    """From (embedding, image features) to identity tokens."""
    crop_order: str = "bgr"
    num_tokens: int = 4
    processor: CLIPImageProcessorPil = field(init=False)

    def __post_init__(self) -> None:
        self.processor = crop_processor(self.image_encoder)

    def configured(self, settings: Adapter) -> FaceIDPlusV2:
        """See `IdentityAdapter`."""
        return replace(self, crop_order=settings.crop_order)

    def tokens(self, identity: Identity, on_device: OnDevice) -> tuple[Tensor, Tensor]:
        """Encode no identity (a zero embedding and a zero image) and a person: [4, width] each."""
        features = crop_features(identity, self.image_encoder, self.processor, self.crop_order, on_device)
        embedding = torch.from_numpy(identity.mean()).to(features.device, features.dtype)
        embeddings = torch.stack([torch.zeros_like(embedding), embedding])
        projection: Any = self.projection
        try:
            projection.clip_embeds = features[:, None]
            with on_device(projection):
                tokens = projection(embeddings[:, None])
        finally:
            projection.clip_embeds = None
        return tokens[0], tokens[1]


def crop_processor(image_encoder: Any) -> CLIPImageProcessorPil:
    """Return the processor that resizes and normalizes a crop for an image encoder."""
    size = image_encoder.config.image_size
    # The plain class would resize differently if torchvision is installed.
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size)


def crop_features(
    identity: Identity, encoder: Any, processor: CLIPImageProcessorPil, order: str, on_device: OnDevice
) -> Tensor:
    """Encode a zero image and a person's crop: `hidden_states[-2]`, [2, patches + 1, width].

    Args:
        identity: the person.
        encoder: a CLIP vision tower.
        processor: of `crop_processor`.
        order: `bgr` passes the crop in BGR order as if it were RGB, as the published FaceID pipeline does.
        on_device: entered around the use of the encoder.
    """
    crop = identity.crop()
    if order == "rgb":
        crop = np.ascontiguousarray(crop[..., ::-1])
    pixels = processor(Image.fromarray(crop), return_tensors="pt").pixel_values
    with on_device(encoder):
        pixels = pixels.to(encoder.device, encoder.dtype)
        images = torch.cat([torch.zeros_like(pixels), pixels])
        features: Tensor = encoder(images, output_hidden_states=True).hidden_states[-2]
    return features


def empty_projection(state: Mapping[str, Tensor]) -> IPAdapterFaceIDPlusImageProjection:
    """Create the projection on the meta device, with the shapes of a state."""
    into = state["proj_in.weight"].shape
    with torch.device("meta"):
        projection = IPAdapterFaceIDPlusImageProjection(
            embed_dims=into[0],
            output_dims=state["proj_out.weight"].shape[0],
            hidden_dims=into[1],
            heads=state["layers.0.attn.to_q.weight"].shape[0] // HEAD_WIDTH,
            id_embeddings_dim=state["proj.net.0.proj.weight"].shape[1],
        )
    projection.shortcut = True
    return projection


def load_adapter(
    pipe: StableDiffusionXLPipeline, file: Path, lora_scale: float, *, fuse: bool = True
) -> torch.nn.Module:
    """Load a FaceID-PlusV2 file into the UNet of a pipeline; see `settle_adapter`."""
    with loading_errors("identity adapter", file):
        read_adapter(pipe, file)
        return settle_adapter(pipe, lora_scale, fuse=fuse)


def read_adapter(pipe: StableDiffusionXLPipeline, file: Path) -> None:
    """Load an adapter file into the UNet of a pipeline with diffusers, which keeps its LoRA unfused."""
    pipe.load_ip_adapter(
        str(file.parent),
        subfolder="",
        weight_name=file.name,
        image_encoder_folder=None,
        local_files_only=True,
    )


def settle_adapter(
    pipe: StableDiffusionXLPipeline, lora_scale: float, *, fuse: bool = True
) -> torch.nn.Module:
    """Scale the LoRA of an adapter in the UNet, fused unless `fuse` is False, and detach its projection.

    The projection leaves the UNet because it runs once per image, not once per step.

    Returns:
        The projection from (embedding, image features) to identity tokens.
    """
    unet = pipe.unet
    if LORA in getattr(unet, "peft_config", {}):
        if lora_scale and fuse:
            fuse_loaded(pipe, LORA, lora_scale)
        elif lora_scale:
            unet.set_adapters([LORA], [lora_scale])
        else:
            pipe.unload_lora_weights()
    projection = unet.encoder_hid_proj.image_projection_layers[0]
    if not hasattr(projection, "shortcut"):
        raise ValueError("it is not a FaceID-PlusV2 file")
    unet.encoder_hid_proj = None
    # With the shortcut the projection is PlusV2; without, it would be Plus.
    projection.shortcut = True
    module: torch.nn.Module = projection.eval()
    return module
