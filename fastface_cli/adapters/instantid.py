"""InstantID: a face embedding gives sixteen identity tokens, and key points condition a ControlNet.

Source: InstantX/InstantID. The ControlNet runs in every branch that is computed, with the identity tokens of
the branch instead of text; its residuals are added in the UNet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import ControlNetModel
from torch import Tensor

from ..quiet import loading_errors
from ..recipe.schema import Adapter
from ..sampling.processor import (
    Extra,
    Rows,
)
from .base import DecoupledAdapter, OnDevice
from .key_points import drawn, placed

if TYPE_CHECKING:
    from ..identity.identity import Identity


@dataclass
class InstantID(DecoupledAdapter):
    """The adapter's projection and ControlNet; its keys and values are in the UNet."""

    projection: torch.nn.Module
    """From the unnormalized embedding to identity tokens."""
    controlnet: torch.nn.Module
    controlnet_scale: float = 0.8
    num_tokens: int = 16

    def configured(self, settings: Adapter) -> InstantID:
        """See `IdentityAdapter`."""
        return replace(self, controlnet_scale=settings.controlnet_scale)

    def tokens(self, identity: Identity, on_device: OnDevice) -> tuple[Tensor, Tensor]:
        """Encode no identity (a zero embedding) and a person: [16, width] each."""
        projection: Any = self.projection
        with on_device(projection):
            weight = projection.proj_in.weight
            embedding = torch.from_numpy(identity.raw_mean()).to(weight.device, weight.dtype)
            tokens = projection(torch.stack([torch.zeros_like(embedding), embedding])[:, None])
        return tokens[0], tokens[1]

    def extra_conditioning(
        self, identities: Sequence[Identity], size: tuple[int, int], on_device: OnDevice
    ) -> Extra | None:
        """Return the ControlNet, conditioned on the key points of each person."""
        if self.controlnet_scale == 0:
            return None
        controlnet: Any = self.controlnet
        images = np.stack([_key_point_image(identity, size) for identity in identities])
        condition = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255

        def extra(latents: Tensor, time: Tensor, rows: Rows) -> Mapping[str, Any]:
            nonlocal condition
            condition = condition.to(latents.device, latents.dtype)  # only copied in the first step
            branches = len(latents) // len(identities)
            with on_device(controlnet):
                down, mid = controlnet(
                    latents,
                    time,
                    encoder_hidden_states=rows.identity,
                    controlnet_cond=condition.repeat(branches, 1, 1, 1),
                    conditioning_scale=self.controlnet_scale,
                    added_cond_kwargs={"text_embeds": rows.pooled, "time_ids": rows.time_ids},
                    return_dict=False,
                )
            return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}

        return extra


def _key_point_image(identity: Identity, size: tuple[int, int]) -> np.ndarray:
    """Draw the key points of the best photo, [height, width, 3] uint8, RGB."""
    best = identity.best()
    points, photo = identity.features["key_points"][best], identity.features["photo_size"][best]
    return drawn(placed(points, (float(photo[0]), float(photo[1])), size), size)


def load_controlnet(paths: Mapping[str, Path], dtype: torch.dtype, unet: Any) -> dict[str, torch.nn.Module]:
    """Load the ControlNet of a recipe, on the CPU.

    Raises:
        ModelUnavailableError: a file is missing or damaged, or its shapes do not fit the UNet.
    """
    folder = paths["controlnet"]
    with loading_errors("ControlNet", folder):
        controlnet, report = ControlNetModel.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        if report["missing_keys"] or report["mismatched_keys"]:
            raise ValueError(f"it lacks {len(report['missing_keys'])} tensors")
        for name in ("block_out_channels", "cross_attention_dim", "in_channels"):
            own, expected = controlnet.config[name], unet.config[name]
            if (list(own) if isinstance(own, tuple | list) else own) != (
                list(expected) if isinstance(expected, tuple | list) else expected
            ):
                raise ValueError(f"its {name} is {own}, but that of the UNet is {expected}")
    return {"controlnet": controlnet.eval().requires_grad_(False)}
