"""DDIM sampling in the four steps of the product, for the stages that train on its results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training import unet
from training.common import autocast, device

TIMESTEPS = (999, 749, 499, 249, -1)
"""Trailing timesteps of four steps, and the end."""
GUIDANCE = 4.0
"""Guidance weight of the text, which is distilled into the LoRA."""


class Ddim:
    """Deterministic DDIM between any two timesteps of SDXL's schedule."""

    def __init__(self) -> None:
        alphas = unet.schedule().alphas_cumprod
        # The final alpha is the first entry, not 1: ``set_alpha_to_one`` is false in SDXL's config.
        self.alphas = torch.cat([alphas, alphas[:1]]).to(device())

    def signal_and_noise(self, timestep: int) -> tuple[Tensor, Tensor]:
        """Return the square roots of alpha and of one minus alpha; timestep -1 is the end."""
        alpha = self.alphas[timestep]
        return alpha.sqrt(), (1 - alpha).sqrt()

    def step(self, x: Tensor, noise: Tensor, start: int, end: int) -> Tensor:
        """Return the latents at ``end`` of latents x [n, 4, h, w] at ``start`` with the predicted noise."""
        a, b = self.signal_and_noise(start)
        c, d = self.signal_and_noise(end)
        return c * (x - b * noise) / a + d * noise

    def error_gain(self, start: int, end: int) -> float:
        """Return the error of the result per error of the predicted noise."""
        a, b = self.signal_and_noise(start)
        c, d = self.signal_and_noise(end)
        return float((d - c * b / a).abs())


class GuidedDenoiser:
    """Noise predictions of a model without and with text; the identity, if given, is used in both."""

    def __init__(
        self, model: Any, states: Tensor, added: dict[str, Tensor], people: Tensor | None = None
    ) -> None:
        self.model = model
        pooled = added["text_embeds"]
        self.added = {
            "text_embeds": torch.cat([torch.zeros_like(pooled), pooled]),
            "time_ids": added["time_ids"].repeat(2, 1),
        }
        texts = torch.cat([torch.zeros_like(states), states])
        self.context: Any = texts if people is None else (texts, [people.repeat(2, 1, 1)[:, None]])

    @torch.no_grad()
    def __call__(self, x: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        """Return the unconditional and the conditional noise, both with the shape of x [n, 4, h, w]."""
        times = torch.full((2 * len(x),), timestep, device=x.device)
        with autocast():
            noise = self.model(x.repeat(2, 1, 1, 1), times, self.context, added_cond_kwargs=self.added).sample
        unconditional, conditional = noise.float().chunk(2)
        return unconditional, conditional

    def guided(self, x: Tensor, timestep: int) -> Tensor:
        """Return the noise with text guidance ``GUIDANCE``."""
        unconditional, conditional = self(x, timestep)
        return unconditional + GUIDANCE * (conditional - unconditional)
