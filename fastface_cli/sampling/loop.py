"""The sampling loop, from noise to latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .guidance import Step

Denoiser: TypeAlias = Callable[[Tensor, Step], Tensor]
"""From latents as scaled by the scheduler, [images, C, h, w], to the guided prediction of a step."""


OnStep: TypeAlias = Callable[[Step, Tensor], None]
"""Called after a step with the step and the latents of the batch, [images, C, h, w]."""


def ignore_step(_step: Step, _latents: Tensor) -> None:
    """The default `OnStep`."""


@dataclass
class Trace:
    """Latents of a batch over the steps."""

    initial_latents: Tensor
    """[images, C, h, w], as scaled for the scheduler."""
    latents: list[Tensor] = field(default_factory=list)
    """After each step, [images, C, h, w]."""


def sample(
    denoiser: Denoiser,
    scheduler: Any,
    noise: Tensor,
    steps: Sequence[Step],
    generators: Sequence[torch.Generator] | None,
    on_step: OnStep = ignore_step,
) -> Trace:
    """Sample a batch with FastFace (arXiv 2505.21144, section 3).

    In every step the denoiser predicts the noise of up to three branches, differing in identity and prompt,
    under manipulated identity attention (AM), and combines them with decoupled guidance (DCG):
    `e = e0 + a (e1 - e0) + b (e2 - e1)`. The scheduler then takes its ordinary step from `e`.

    Args:
        denoiser: computes the guided prediction of a step.
        scheduler: a diffusers scheduler with its timesteps set.
        noise: [images, C, h, w], standard normal.
        steps: one per timestep.
        generators: one per image for a stochastic scheduler, which draws from them; None for the others.
        on_step: called after each step.
    """
    latents = noise * scheduler.init_noise_sigma
    trace = Trace(latents.clone())
    extra = {"generator": list(generators)} if generators else {}
    for step, t in zip(steps, scheduler.timesteps, strict=True):
        prediction = denoiser(scheduler.scale_model_input(latents, t), step)
        latents = scheduler.step(prediction, t, latents, **extra, return_dict=False)[0]
        trace.latents.append(latents)
        on_step(step, latents)
    return trace
