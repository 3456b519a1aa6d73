"""Small previews of latents: a linear map from latent channels to colors, fitted to the VAE once."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from ..app.pipeline import Pipeline

SIDE = 128
"""Longest side of a preview in pixels."""
FIELD = 32
"""Side of the latents that the map is fitted to."""


class PreviewMap:
    """Latents to colors, without the VAE.

    A VAE's colors are nearly linear in its latents. The map is fitted by least squares to the decoding of
    smooth random latents, so that it suits any VAE and costs one small decoding.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        backbone = pipeline.backbone
        generator = torch.Generator("cpu").manual_seed(0)
        coarse = torch.randn(1, backbone.latent_channels, 6, 6, generator=generator)
        latents = F.interpolate(coarse, size=(FIELD, FIELD), mode="bicubic")[0]
        latents = latents / latents.std()
        with torch.inference_mode(), backbone.on_device(pipeline.vae, offloaded=pipeline.level.models):
            image = backbone.decode(latents.to(pipeline.device))
        colors = F.adaptive_avg_pool2d(image.float().cpu(), FIELD).flatten(1).T
        inputs = torch.cat([latents.flatten(1).T, torch.ones(FIELD * FIELD, 1)], dim=1)
        self._map = torch.linalg.lstsq(inputs, colors).solution
        """[latent channels + 1, 3]"""

    def previews(self, latents: Tensor) -> list[str]:
        """A data URL of each image of a batch.

        Args:
            latents: [images, C, h, w], at any scale: early steps are mostly noise.
        """
        latents = latents.detach().float().cpu()
        spread = latents.std(dim=(1, 2, 3), keepdim=True).clamp(min=1.0)
        colors = torch.einsum("nchw,cd->nhwd", latents / spread, self._map[:-1]) + self._map[-1]
        pixels = (colors.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        return [_data_url(Image.fromarray(each)) for each in pixels]


def _data_url(image: Image.Image) -> str:
    image.thumbnail((SIDE, SIDE))
    encoded = io.BytesIO()
    image.save(encoded, format="WEBP", quality=60, method=0)
    return "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode()
