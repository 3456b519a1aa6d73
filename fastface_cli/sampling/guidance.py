"""Decoupled classifier-free guidance: which branches a step needs, and how they combine.

Source: FastFace (arXiv 2505.21144), section 3. Branches in batch order are e0 (no identity, negative
prompt), e1 and e2; `guided = e0 + a * term1 + b * term2`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..recipe.schema import TIMESTEPS, Attention, Guidance, Order, Weight, WeightFunction, per_step

if TYPE_CHECKING:
    from torch import Tensor


class Branch(NamedTuple):
    """The conditions of one UNet sample."""

    identity: bool
    """Conditioned on the person, or on no identity."""
    prompt: bool
    """Conditioned on the prompt, or on the negative prompt."""


BRANCHES: Mapping[Order, tuple[Branch, Branch, Branch]] = {
    "identity_first": (Branch(False, False), Branch(True, False), Branch(True, True)),
    "text_first": (Branch(False, False), Branch(False, True), Branch(True, True)),
    "independent": (Branch(False, False), Branch(False, True), Branch(True, False)),
}
"""e0, e1, e2 of each order."""

ALL = (0, 1, 2)


@dataclass(frozen=True)
class Step:
    """The weights and branches of one step."""

    index: int
    timestep: float
    identity: float
    """Weight of the identity direction at this step."""
    text: float
    """Weight of the text direction at this step."""
    branches: tuple[int, ...]
    """Which of e0, e1, e2 are computed, in this order."""


def weight_at(weight: WeightFunction, timestep: float) -> float:
    """Return the value of a guidance weight function at a timestep in [0, 1000]."""
    t = TIMESTEPS - timestep if weight.inverse else timestep
    share, w = t / TIMESTEPS, weight.scale
    match weight.function:
        case "constant":
            value = w
        case "linear":
            value = w * (1 - share)
        case "cosine":
            value = w * (math.cos(math.pi * share) + 1)
        case "power_cosine":
            # By rounding, 1 - share may be slightly negative, and a fractional power of it is complex.
            value = 0.5 * w * (1 - math.cos(math.pi * max(1 - share, 0.0) ** weight.power))
        case "cap":
            value = w * (1 - share) if share > 0.5 else w * share
    return value if weight.floor is None else max(weight.floor, value)


def weights(weight: Weight, timesteps: Sequence[float]) -> list[float]:
    """Return a weight at every step."""
    if isinstance(weight, WeightFunction):
        return [weight_at(weight, t) for t in timesteps]
    return per_step(weight, len(timesteps))


def coefficients(order: Order, identity: float, text: float) -> tuple[float, float, float]:
    """Return the coefficients of e0, e1, e2 in the guided prediction, without renorm.

    `identity_first` and `text_first`: (1 - a) e0 + (a - b) e1 + b e2;
    `independent`: (1 - a - b) e0 + a e1 + b e2.
    """
    a, b = (identity, text) if order == "identity_first" else (text, identity)
    return (1 - a - b, a, b) if order == "independent" else (1 - a, a - b, b)


def couples_branches(attention: Attention, step: int) -> bool:
    """Return whether attention manipulation mixes the branches of an image at this step."""
    is_applied = attention.steps == "all" or step in attention.steps
    masks = any(t.kind in ("softmask", "adaptive_softmask") for t in attention.transforms)
    return attention.active and is_applied and masks and attention.normalisation == "joint"


def needed_branches(guidance: Guidance, identity: float, text: float) -> tuple[int, ...]:
    """Return the branches that the guided result depends on, if attention does not mix them."""
    second = text if guidance.order == "identity_first" else identity
    if guidance.renorm and second != 0:
        return ALL
    needed = {index for index, c in enumerate(coefficients(guidance.order, identity, text)) if c != 0}
    if guidance.rescale > 0:
        needed |= {1, 2}
    return tuple(sorted(needed))


def plan(
    guidance: Guidance, attention: Attention, timesteps: Sequence[float], *, prune: bool = True
) -> list[Step]:
    """Return the branches and weights of every step.

    Args:
        guidance: weights and order.
        attention: if it couples the branches, none is omitted.
        timesteps: of the scheduler, one per step.
        prune: omit branches that cannot change the result.
    """
    identity, text = weights(guidance.identity, timesteps), weights(guidance.text, timesteps)
    steps = []
    for index, timestep in enumerate(timesteps):
        keep = not prune or couples_branches(attention, index)
        branches = ALL if keep else needed_branches(guidance, identity[index], text[index])
        steps.append(Step(index, timestep, identity[index], text[index], branches))
    return steps


def is_renormed(step: Step, guidance: Guidance) -> bool:
    """Return whether `mix` renorms, which requires all branches."""
    return guidance.renorm and step.branches == ALL


def mixing(step: Step, guidance: Guidance) -> tuple[float, ...]:
    """Return the numbers for `mix`: a and b with renorm, otherwise the coefficient of every branch."""
    if is_renormed(step, guidance):
        first, second = step.identity, step.text
        return (first, second) if guidance.order == "identity_first" else (second, first)
    scaled = coefficients(guidance.order, step.identity, step.text)
    return tuple(scaled[branch] for branch in step.branches)


def mix(
    predictions: Tensor, numbers: Sequence[float] | Tensor, order: Order, rescale: float, *, renorm: bool
) -> Tensor:
    """Return the guided prediction, [images, C, H, W] float32.

    Args:
        predictions: [branches, images, C, H, W]; with a rescale, the last two are e1 and e2.
        numbers: see `mixing`; a tensor in compiled steps, whose graph must not depend on the values.
        order: of the branches.
        rescale: phi.
        renorm: scale the second term to the norm of the first.
    """
    e = predictions.float()
    if renorm:
        guided = _renormed(e, numbers[0], numbers[1], order)
    else:
        guided = numbers[0] * e[0]
        for index in range(1, len(e)):
            guided = guided + numbers[index] * e[index]
    if rescale > 0:
        target = (_std(e[-2]) + _std(e[-1])) / (2 * _std(guided))
        guided = guided * (rescale * target + (1 - rescale))
    return guided


def _renormed(e: Tensor, a: float | Tensor, b: float | Tensor, order: Order) -> Tensor:
    """Return the guided prediction with the second term scaled to the norm of the first, per image."""
    term1 = e[1] - e[0]
    term2 = e[2] - (e[0] if order == "independent" else e[1])
    norm1 = term1.flatten(1).norm(dim=1)[:, None, None, None]
    norm2 = term2.flatten(1).norm(dim=1)[:, None, None, None]
    # If two branches are equal, their difference stays zero.
    term2 = term2 * (norm1 / norm2.clamp_min(1e-12))
    guided: Tensor = e[0] + a * term1 + b * term2
    return guided


def _std(x: Tensor) -> Tensor:
    return x.std(dim=(1, 2, 3), keepdim=True)
