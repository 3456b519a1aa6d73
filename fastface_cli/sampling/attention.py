"""Attention manipulation: pure transforms of identity attention.

Source: FastFace (arXiv 2505.21144), section 3. Identity attention is `A = softmax(Q K_id^T / sqrt(d))`,
[rows, heads, positions, tokens]; rows are branch-major (all images of the first branch, then of the second).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..recipe.schema import (
    AdaptiveSoftmask,
    Attention,
    Block,
    Blocks,
    PerBlock,
    Power,
    Scale,
    Softmask,
    per_step,
)

LEAST_QUANTILE = 17 * 2.0**-24
"""1e-6, rounded to float16."""

Number: TypeAlias = float | Tensor
"""A number of a schedule: a float, or in compiled steps a tensor [], so that the graph fits other values."""


@dataclass(frozen=True)
class Chain:
    """Attention manipulation of one block type at one step, with all numbers resolved."""

    transforms: tuple[tuple[Power | Scale | Softmask | AdaptiveSoftmask, Mapping[str, Number]], ...]
    tokens: tuple[int, ...]
    invert_token_0: bool
    joint: bool
    blend: tuple[float, float] | None
    """weight, eps."""


def resolve(attention: Attention, block: Block, step: int, steps: int, tokens: int = 4) -> Chain | None:
    """Resolve the manipulation in `block` at `step` of `steps`; None if attention is unchanged.

    `tokens` is the number of identity tokens of the adapter.
    """
    is_applied = attention.steps == "all" or step in attention.steps
    if not (attention.active and is_applied and block in attention.blocks):
        return None
    transforms = []
    for transform in attention.transforms:
        numbers = {
            name: _at(getattr(transform, name), block, step, steps)
            for name in ("p", "g", "k", "level")
            if hasattr(transform, name)
        }
        transforms.append((transform, numbers))
    blend = (attention.blend.weight, attention.blend.eps) if attention.blend else None
    return Chain(
        transforms=tuple(transforms),
        tokens=tuple(range(tokens) if attention.tokens == "all" else attention.tokens),
        invert_token_0=attention.invert_token_0,
        joint=attention.normalisation == "joint",
        blend=blend,
    )


Chains: TypeAlias = dict[Block, Chain | None]
"""The manipulation in each part of the UNet."""


def as_tensors(steps: Sequence[Chains], device: torch.device) -> list[Chains]:
    """Move the numbers of the chains of all steps to `device` as tensors, in one transfer."""
    numbers = [
        number
        for chains in steps
        for chain in chains.values()
        if chain is not None
        for _, named in chain.transforms
        for number in named.values()
    ]
    on_device = iter(torch.tensor(numbers, dtype=torch.float32).to(device).unbind())

    def converted(chain: Chain | None) -> Chain | None:
        if chain is None:
            return None
        transforms = tuple(
            (transform, {name: next(on_device) for name in named}) for transform, named in chain.transforms
        )
        return replace(chain, transforms=transforms)

    return [{block: converted(chain) for block, chain in chains.items()} for chains in steps]


def _at(value: PerBlock, block: Block, step: int, steps: int) -> float:
    chosen = getattr(value, block) if isinstance(value, Blocks) else value
    return per_step(chosen, steps)[step]


def normalize(attention: Tensor, images: int, *, joint: bool) -> Tensor:
    """Min-max normalization per token, over heads and positions, and with `joint` over branches.

    Args:
        attention: [rows, heads, positions, tokens], rows = branches x images, branch-major.
        images: number of images in the rows; each image is normalized separately.
        joint: normalize the branches of an image together, not separately.
    """
    split = attention.reshape(-1, images, *attention.shape[1:])
    over = (0, 2, 3) if joint else (2, 3)
    low, high = split.amin(dim=over, keepdim=True), split.amax(dim=over, keepdim=True)
    # A constant map has no range; it becomes zero instead of NaN.
    spread = (high - low).clamp_min(torch.finfo(attention.dtype).tiny)
    return ((split - low) / spread).reshape(attention.shape)


def quantile(attention: Tensor, level: Number) -> Tensor:
    """Return the quantile over positions, interpolated linearly and rounded to float16, at least 1e-6.

    torch.quantile is not used: it refuses large tensors, and reads the value of `level`, which compiled code
    cannot do.

    Args:
        attention: [rows, heads, positions, tokens], float32.
        level: in [0, 1].

    Returns:
        [rows, heads, 1, tokens], float32.
    """
    ordered = attention.sort(dim=-2).values
    rank = torch.as_tensor(level, dtype=torch.float32, device=attention.device) * (attention.shape[-2] - 1)
    below = rank.floor()
    low = ordered.index_select(-2, below.long().reshape(1))
    high = ordered.index_select(-2, rank.ceil().long().reshape(1))
    return round_to_half(torch.lerp(low, high, rank - below)).clamp_min(LEAST_QUANTILE)


def round_to_half(x: Tensor) -> Tensor:
    """Return `x.half().float()` for numbers below 65504, by arithmetic: compilers omit two opposite casts."""
    if x.device.type == "mps":  # it has no frexp, and nothing is compiled for it
        return x.half().float()
    # float16 has 11 significant bits, and none below 2^-24.
    lowest_bit = (torch.frexp(x).exponent - 11).clamp_min(-24)
    unit = torch.ldexp(torch.ones_like(x), lowest_bit)
    return (x / unit).round() * unit


def manipulate(attention: Tensor, chain: Chain, images: int) -> Tensor:
    """Return the manipulated attention: inversion, chain and inversion back, on the chosen tokens.

    Args:
        attention: [rows, heads, positions, tokens], float32; not changed.
        chain: the manipulation.
        images: images in the rows.
    """
    tokens = list(chain.tokens)
    a = attention[..., tokens]
    inverted = tokens.index(0) if chain.invert_token_0 and 0 in tokens else None
    if inverted is not None:
        a = _replace(a, inverted, 1 - a[..., inverted])
    for transform, numbers in chain.transforms:
        a = _apply(a, transform, numbers, images, joint=chain.joint)
    if inverted is not None:
        a0 = a[..., inverted]
        a = _replace(a, inverted, a0.amax(dim=-1, keepdim=True) - a0)
    changed = attention.clone()
    changed[..., tokens] = a
    return changed


def _replace(a: Tensor, index: int, column: Tensor) -> Tensor:
    a = a.clone()
    a[..., index] = column
    return a


def _apply(
    a: Tensor,
    transform: Power | Scale | Softmask | AdaptiveSoftmask,
    numbers: Mapping[str, Number],
    images: int,
    *,
    joint: bool,
) -> Tensor:
    if isinstance(transform, Power):
        return a ** numbers["p"]
    if isinstance(transform, Scale):
        return (numbers["g"] * a).clamp_max(transform.cap)
    threshold: float | Tensor
    threshold = (
        quantile(a, numbers["level"]) if isinstance(transform, AdaptiveSoftmask) else transform.threshold
    )
    mask = torch.sigmoid(numbers["k"] * (normalize(a, images, joint=joint) - threshold))
    return normalize(mask, images, joint=joint)


def blend(changed: Tensor, original: Tensor, weight: float, eps: float) -> Tensor:
    """Return w X' + (1 - w) Y, where Y is X' with the mean and unbiased std of X over the last dimension."""
    mean, std = original.mean(-1, keepdim=True), original.std(-1, keepdim=True)
    moved = (changed - changed.mean(-1, keepdim=True)) * (std / (changed.std(-1, keepdim=True) + eps)) + mean
    out: Tensor = weight * changed + (1 - weight) * moved
    return out


def identity_attention(query: Tensor, key: Tensor, value: Tensor, chain: Chain | None, images: int) -> Tensor:
    """Return the identity part of decoupled cross-attention.

    Args:
        query: [rows, heads, positions, d].
        key, value: [rows, heads, tokens, d].
        chain: manipulation, or None for plain attention.
        images: images in the rows.

    Returns:
        [rows, heads, positions, d] in the dtype of `query`. Manipulation runs in float32, which costs
        little with few tokens: quantile and range would lose precision in float16.
    """
    if chain is None:
        return F.scaled_dot_product_attention(query, key, value)
    scores = (query @ key.transpose(-2, -1)).float() * query.shape[-1] ** -0.5
    original = torch.softmax(scores, dim=-1)
    changed = manipulate(original, chain, images)
    value = value.float()
    if chain.blend is None:
        return (changed @ value).to(query.dtype)
    weight, eps = chain.blend
    out = blend(changed, original, weight, eps) @ value
    moved = blend(out, original @ value, weight, eps)
    # Skipped for images in which it gives NaN; other images of the batch are not affected.
    broken = moved.isnan().reshape(-1, images, moved[0].numel()).any(-1).any(0)
    broken = broken.repeat(query.shape[0] // images)[:, None, None, None]
    return torch.where(broken, out, moved).to(query.dtype)
