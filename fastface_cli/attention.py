"""Attention manipulation: pure transforms of identity attention, and the one attention processor.

Source: FastFace (arXiv 2505.21144), section 3. Identity attention is `A = softmax(Q K_id^T / sqrt(d))`,
[rows, heads, positions, tokens]; rows are branch-major (all images of the first branch, then of the second).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention as AttentionLayer
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import Tensor

from .recipe import AdaptiveSoftmask, Attention, Block, Blocks, PerBlock, Power, Scale, Softmask, per_step

QUANTILE_LIMIT = 16_000_000
"""torch.quantile refuses tensors with more elements."""


@dataclass(frozen=True)
class Chain:
    """Attention manipulation of one kind of block at one step, with every number resolved."""

    transforms: tuple[tuple[Power | Scale | Softmask | AdaptiveSoftmask, dict[str, float]], ...]
    tokens: tuple[int, ...]
    invert_token_0: bool
    joint: bool
    blend: tuple[float, float] | None
    """weight, eps."""


def resolve(attention: Attention, block: Block, step: int, steps: int) -> Chain | None:
    """What to do in `block` at `step` of `steps`, or None for nothing."""
    acts = attention.steps == "all" or step in attention.steps
    if not (attention.active and acts and block in attention.blocks):
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
        tokens=tuple(attention.tokens),
        invert_token_0=attention.invert_token_0,
        joint=attention.normalisation == "joint",
        blend=blend,
    )


def _at(value: PerBlock, block: Block, step: int, steps: int) -> float:
    chosen = getattr(value, block) if isinstance(value, Blocks) else value
    return per_step(chosen, steps)[step]


def normalise(attention: Tensor, images: int, *, joint: bool) -> Tensor:
    """Min-max normalisation per token, over branches (`joint`), heads and positions.

    Args:
        attention: [rows, heads, positions, tokens], rows = branches x images, branch-major.
        images: images in the rows; one image never sees another.
        joint: over the branches of an image together, or each branch by itself.
    """
    split = attention.reshape(-1, images, *attention.shape[1:])
    over = (0, 2, 3) if joint else (2, 3)
    low, high = split.amin(dim=over, keepdim=True), split.amax(dim=over, keepdim=True)
    # A constant map has no range; it becomes zero and not NaN.
    spread = (high - low).clamp_min(torch.finfo(attention.dtype).tiny)
    return ((split - low) / spread).reshape(attention.shape)


def quantile(attention: Tensor, level: float) -> Tensor:
    """Quantile over positions, rounded to float16 as published, at least 1e-6.

    Args:
        attention: [rows, heads, positions, tokens], float32.
        level: in [0, 1].

    Returns:
        [rows, heads, 1, tokens], float32.
    """
    if attention.numel() <= QUANTILE_LIMIT:
        found = torch.quantile(attention, level, dim=-2, keepdim=True)
    else:
        found = torch.stack([torch.quantile(row, level, dim=-2, keepdim=True) for row in attention])
    return found.half().clamp_min(1e-6).float()


def manipulate(attention: Tensor, chain: Chain, images: int) -> Tensor:
    """A' from A: inversion, chain and inversion back, on the chosen tokens; the blend is applied later.

    Args:
        attention: [rows, heads, positions, tokens], float32; not changed.
        chain: what to do.
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
    numbers: dict[str, float],
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
    mask = torch.sigmoid(numbers["k"] * (normalise(a, images, joint=joint) - threshold))
    return normalise(mask, images, joint=joint)


def blend(changed: Tensor, original: Tensor, weight: float, eps: float) -> Tensor:
    """w X' + (1 - w) X', the latter moved to the mean and unbiased std of X over the last dimension."""
    mean, std = original.mean(-1, keepdim=True), original.std(-1, keepdim=True)
    moved = (changed - changed.mean(-1, keepdim=True)) * (std / (changed.std(-1, keepdim=True) + eps)) + mean
    out: Tensor = weight * changed + (1 - weight) * moved
    return out


def identity_attention(query: Tensor, key: Tensor, value: Tensor, chain: Chain | None, images: int) -> Tensor:
    """The identity half of decoupled cross-attention.

    Args:
        query: [rows, heads, positions, d].
        key, value: [rows, heads, tokens, d].
        chain: manipulation, or None for plain attention.
        images: images in the rows.

    Returns:
        [rows, heads, positions, d] in the dtype of `query`. Manipulation runs in float32: the maps are
        four tokens wide, so this costs nothing and spares the quantile and the spread half precision.
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
    # Skipped for an image in which it produced a NaN, never for its neighbours in the batch.
    broken = moved.isnan().reshape(-1, images, moved[0].numel()).any(-1).any(0)
    broken = broken.repeat(query.shape[0] // images)[:, None, None, None]
    return torch.where(broken, out, moved).to(query.dtype)


KeysAndValues: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of the text, then of the identity: key, value, key, value."""


@dataclass
class Conditions:
    """What the rows of a UNet call attend to, and the state of the run: nothing of it outlives the run.

    Keys and values are projected once a run for every distinct condition and then picked by row.
    """

    text: Tensor
    """[2 x images, tokens, width]: negative prompts of all images, then prompts."""
    identity: Tensor
    """[2 x images, 4, width]: no identity for all images, then the identities."""
    scale: Tensor
    """[images]: adapter scale of each image."""
    images: int
    text_rows: Tensor = field(init=False)
    identity_rows: Tensor = field(init=False)
    row_scale: Tensor = field(init=False)
    branches: tuple[tuple[bool, bool], ...] = ()
    chains: dict[Block, Chain | None] = field(default_factory=dict)
    speaks: bool = field(init=False)
    """False where every adapter scale is 0: the identity half is left out."""
    projected: dict[int, KeysAndValues] = field(default_factory=dict)
    picked: dict[int, tuple[tuple[tuple[bool, bool], ...], KeysAndValues]] = field(default_factory=dict)
    """By layer: the branches that rows were last picked for, and those rows."""

    def __post_init__(self) -> None:
        self.speaks = bool((self.scale != 0).any())

    def select(self, branches: Sequence[tuple[bool, bool]], chains: dict[Block, Chain | None]) -> None:
        """Say what the next UNet call computes: (identity, prompt) of each branch, and the manipulation."""
        self.branches, self.chains = tuple(branches), chains
        image = torch.arange(self.images, device=self.text.device)
        self.identity_rows = torch.cat([image + self.images * identity for identity, _ in branches])
        self.text_rows = torch.cat([image + self.images * prompt for _, prompt in branches])
        self.row_scale = self.scale.repeat(len(branches))[:, None, None, None]

    def keys_and_values(
        self, layer: AttentionLayer, to_k_ip: torch.nn.Module, to_v_ip: torch.nn.Module
    ) -> KeysAndValues:
        """Text keys and values, identity keys and values of the rows: [rows, heads, tokens, d] each."""
        branches, rows = self.picked.get(id(layer), ((), None))
        if rows is None or branches != self.branches:
            if id(layer) not in self.projected:
                self.projected[id(layer)] = (
                    _heads(layer.to_k(self.text), layer.heads),
                    _heads(layer.to_v(self.text), layer.heads),
                    _heads(to_k_ip(self.identity), layer.heads),
                    _heads(to_v_ip(self.identity), layer.heads),
                )
            tk, tv, ik, iv = self.projected[id(layer)]
            rows = (tk[self.text_rows], tv[self.text_rows], ik[self.identity_rows], iv[self.identity_rows])
            self.picked[id(layer)] = (self.branches, rows)
        return rows


def _heads(x: Tensor, heads: int) -> Tensor:
    """[rows, tokens, heads x d] -> [rows, heads, tokens, d]."""
    return x.reshape(*x.shape[:-1], heads, -1).transpose(1, 2)


class IdentityAttnProcessor(IPAdapterAttnProcessor2_0):  # type: ignore[misc]
    """Decoupled cross-attention whose conditions and manipulation come from the run.

    Takes over the adapter's projections of a loaded `IPAdapterAttnProcessor2_0`; copies no weight.
    """

    def __init__(self, loaded: IPAdapterAttnProcessor2_0, block: Block, conditions: Conditions) -> None:
        # Not the parent's constructor: it would allocate projections only to have them replaced.
        torch.nn.Module.__init__(self)
        self.hidden_size, self.cross_attention_dim = loaded.hidden_size, loaded.cross_attention_dim
        self.num_tokens, self.scale = loaded.num_tokens, loaded.scale
        self.to_k_ip, self.to_v_ip = loaded.to_k_ip, loaded.to_v_ip
        self.block: Block = block
        self.conditions = conditions

    def __call__(
        self,
        attn: AttentionLayer,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend to text and identity.

        Args:
            attn: the cross-attention layer, as SDXL builds it (no norms, no residual of its own).
            hidden_states: [rows, positions, width].
            encoder_hidden_states: unused; the run holds the conditions of all rows.
            attention_mask: must be None, as it is in SDXL.
            temb: unused.
        """
        if attention_mask is not None:
            raise ValueError("identity attention takes no attention mask")
        run = self.conditions
        query = _heads(attn.to_q(hidden_states), attn.heads)
        text_key, text_value, key, value = run.keys_and_values(attn, self.to_k_ip[0], self.to_v_ip[0])
        out = F.scaled_dot_product_attention(query, text_key, text_value)
        if run.speaks:
            chain = run.chains.get(self.block)
            identity = identity_attention(query, key, value, chain, run.images)
            out = out + run.row_scale.to(out.dtype) * identity
        hidden_states = out.transpose(1, 2).flatten(2)
        projected: Tensor = attn.to_out[0](hidden_states)
        return projected  # to_out[1] is dropout, which does nothing at inference


def block_of(name: str) -> Block:
    """The part of the UNet that a layer belongs to, by its dotted name."""
    return "down" if name.startswith("down") else "up" if name.startswith("up") else "mid"


def identity_layers(unet: torch.nn.Module) -> list[tuple[Block, AttentionLayer]]:
    """The cross-attention layers that hold an adapter, each with the part of the UNet it belongs to."""
    return [
        (block_of(name), layer)
        for name, layer in unet.named_modules()
        if isinstance(getattr(layer, "processor", None), IPAdapterAttnProcessor2_0)
    ]


@contextmanager
def installed(layers: Sequence[tuple[Block, AttentionLayer]], conditions: Conditions) -> Iterator[None]:
    """For the time of the context identity attention reads `conditions`; then all is as before.

    Args:
        layers: of `identity_layers`, found once: walking through a UNet takes longer than a small step.
        conditions: of the run.
    """
    before = [layer.processor for _, layer in layers]
    try:
        for (block, layer), loaded in zip(layers, before, strict=True):
            layer.processor = IdentityAttnProcessor(loaded, block, conditions)
        yield
    finally:
        for (_, layer), loaded in zip(layers, before, strict=True):
            layer.processor = loaded
