"""The base model: text encoders, latents and VAE. Another base is another class."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from ..quiet import quiet_libraries
from ..recipe.schema import Block
from .offload import Level, visiting

log = logging.getLogger(__name__)


class Backbone(Protocol):
    """The interface of a base model to the pipeline."""

    unet: torch.nn.Module
    device: torch.device
    """The device it runs on; offloaded modules are in CPU memory between uses."""
    dtype: torch.dtype
    level: Level
    latent_channels: int
    latent_scale: int
    """Pixels per latent, in each direction."""
    blocks: tuple[Block, ...]
    """Parts of the UNet that a recipe can manipulate."""

    def encode_prompt(self, text: str | None) -> tuple[Tensor, Tensor]:
        """Return text embeddings [tokens, width] and pooled [width]; None means no text."""

    def time_ids(self, width: int, height: int) -> Tensor:
        """Return the conditioning on the image size, [1, numbers]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [channels, h, w] to an image [3, H, W] float32 in [0, 1]."""

    def on_device(self, *modules: torch.nn.Module, offloaded: bool) -> AbstractContextManager[None]:
        """Move modules to the device inside the context if they are `offloaded`."""


class SDXL:
    """Stable Diffusion XL: two CLIP text encoders, four latent channels, conditioning on sizes and crop.

    Args:
        parts: the loaded models.
        level: which of them are offloaded.
        device: to run on; None is the device of the UNet.
        decode: `vae_decode` or its compiled form.
    """

    latent_channels = 4
    blocks: tuple[Block, ...] = ("down", "mid", "up")

    def __init__(
        self,
        parts: StableDiffusionXLPipeline,
        level: Level,
        device: torch.device | None = None,
        decode: Callable[..., Tensor] | None = None,
    ) -> None:
        self.parts = parts
        self.level = level
        self.unet: Any = parts.unet
        self.vae: Any = parts.vae
        self.device: torch.device = device or parts.unet.device
        self.dtype: torch.dtype = parts.unet.dtype
        self.latent_scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self._vae_decode = decode or vae_decode
        self._truncated: set[str] = set()

    def encode_prompt(self, text: str | None) -> tuple[Tensor, Tensor]:
        """See `Backbone`; None gives zeros, which is not the encoding of an empty text."""
        if text is None:
            first, second = self.parts.text_encoder.config, self.parts.text_encoder_2.config
            shape = (self.parts.tokenizer.model_max_length, first.hidden_size + second.hidden_size)
            zeros = torch.zeros(shape, device=self.device, dtype=self.dtype)
            return zeros, zeros.new_zeros(second.projection_dim)
        encoders = (self.parts.text_encoder, self.parts.text_encoder_2)
        with quiet_libraries(), self.on_device(*encoders, offloaded=self.level.encoders):
            self._warn_if_truncated(text)
            embeds, _, pooled, _ = self.parts.encode_prompt(
                text, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        return embeds[0], pooled[0]

    def _warn_if_truncated(self, text: str) -> None:
        tokenizer = self.parts.tokenizer
        ids = tokenizer(text, verbose=False)["input_ids"]
        limit = tokenizer.model_max_length
        if len(ids) > limit and text not in self._truncated:
            self._truncated.add(text)
            rest = tokenizer.decode(ids[limit - 1 : -1], skip_special_tokens=True).strip()
            log.warning(
                "the text encoders read %d tokens; this part of the prompt is ignored: %s", limit - 2, rest
            )

    def time_ids(self, width: int, height: int) -> Tensor:
        """See `Backbone`: original size, crop corner and target size, each as (height, width), [1, 6]."""
        return torch.tensor([[height, width, 0, 0, height, width]], device=self.device, dtype=self.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """See `Backbone`."""
        scaled = latents[None].to(self.vae.dtype) / self.vae.config.scaling_factor
        return self._vae_decode(self.vae, scaled)

    def on_device(self, *modules: torch.nn.Module, offloaded: bool) -> AbstractContextManager[None]:
        """See `Backbone`."""
        # Checked first because traversing a large module is slower than a small step.
        return visiting(self.device, *modules) if offloaded else nullcontext()


def vae_decode(vae: Any, scaled: Tensor) -> Tensor:
    """Decode scaled latents [1, 4, h, w] to an image [3, H, W] float32 in [0, 1]; this can be compiled."""
    decoded: Tensor = vae.decode(scaled, return_dict=False)[0][0]
    return (decoded.float() / 2 + 0.5).clamp(0, 1)
