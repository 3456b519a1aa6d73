"""Attention manipulation: pure transforms of identity attention, and the one attention processor.

Source: FastFace (arXiv 2505.21144), section 3. Identity attention is `A = softmax(Q K_id^T / sqrt(d))`,
[rows, heads, positions, tokens]; rows are branch-major (all images of the first branch, then of the second).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention as AttentionLayer
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
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
"""1e-6, as float16 has it."""

Number: TypeAlias = float | Tensor
"""A number of a schedule: a float, or a tensor [] where a compiled step must not be bound to its value."""


@dataclass(frozen=True)
class Chain:
    """Attention manipulation of one kind of block at one step, with every number resolved."""

    transforms: tuple[tuple[Power | Scale | Softmask | AdaptiveSoftmask, Mapping[str, Number]], ...]
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


Chains: TypeAlias = dict[Block, Chain | None]
"""What is done in each part of the UNet."""


def as_tensors(steps: Sequence[Chains], device: torch.device) -> list[Chains]:
    """The chains of every step with their numbers as tensors on `device`, sent there in one go."""
    numbers = [
        number
        for chains in steps
        for chain in chains.values()
        if chain is not None
        for _, named in chain.transforms
        for number in named.values()
    ]
    sent = iter(torch.tensor(numbers, dtype=torch.float32).to(device).unbind())

    def converted(chain: Chain | None) -> Chain | None:
        if chain is None:
            return None
        transforms = tuple((one, {name: next(sent) for name in named}) for one, named in chain.transforms)
        return replace(chain, transforms=transforms)

    return [{block: converted(chain) for block, chain in chains.items()} for chains in steps]


def _at(value: PerBlock, block: Block, step: int, steps: int) -> float:
    chosen = getattr(value, block) if isinstance(value, Blocks) else value
    return per_step(chosen, steps)[step]


def normalize(attention: Tensor, images: int, *, joint: bool) -> Tensor:
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


def quantile(attention: Tensor, level: Number) -> Tensor:
    """Quantile over positions, interpolated linearly, rounded to float16 as published, at least 1e-6.

    torch.quantile is not used: it refuses large tensors, and looks at the value of `level`, which no compiled
    graph can.

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
    """`x.half().float()` for numbers below 65504, by arithmetic: compilers drop a cast there and back."""
    # A half has 11 bits from the first that is set, and none below 2^-24.
    lowest_bit = (torch.frexp(x).exponent - 11).clamp_min(-24)
    unit = torch.ldexp(torch.ones_like(x), lowest_bit)
    return (x / unit).round() * unit


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


@dataclass(frozen=True)
class Rows:
    """What the rows of one UNet call attend to; the UNet hands it on as `encoder_hidden_states`."""

    text: Tensor
    """[rows, tokens, width]"""
    identity: Tensor
    """[rows, 4, width]"""
    projected: tuple[tuple[Tensor, Tensor], ...]
    """Keys and values of text and identity by group of layers, [2, layers, rows, heads, tokens, d] each;
    none where every layer projects its own."""
    scale: Tensor
    """[rows, 1, 1, 1]: adapter scale."""
    images: int
    chains: Chains
    speaks: bool
    """False leaves the identity half out."""


@dataclass
class Conditions:
    """What the images of a run attend to; nothing of it outlives the run."""

    text: Tensor
    """[2 x images, tokens, width]: negative prompts of all images, then prompts."""
    identity: Tensor
    """[2 x images, 4, width]: no identity for all images, then the identities."""
    scale: Tensor
    """[images]: adapter scale of each image."""
    images: int
    speaks: bool = True
    """False where every adapter scale is 0: the identity half may be left out then."""
    projected: tuple[tuple[Tensor, Tensor], ...] = ()
    """Of `project`; empty where every UNet call projects again."""
    text_rows: Tensor = field(init=False)
    """Rows of `text` of the branches last selected."""
    selected: Rows | None = None
    branches: tuple[tuple[bool, bool], ...] = ()

    def select(self, branches: Sequence[tuple[bool, bool]], chains: Chains) -> Rows:
        """What the next UNet call computes: (identity, prompt) of each branch, and the manipulation."""
        if self.selected is not None and tuple(branches) == self.branches:
            self.selected = replace(self.selected, chains=chains)
            return self.selected
        self.branches = tuple(branches)
        image = torch.arange(self.images)
        where = self.text.device
        identity_rows = torch.cat([image + self.images * identity for identity, _ in branches]).to(where)
        self.text_rows = torch.cat([image + self.images * prompt for _, prompt in branches]).to(where)
        self.selected = Rows(
            text=self.text[self.text_rows],
            identity=self.identity[identity_rows],
            projected=tuple(
                (text.index_select(2, self.text_rows), identity.index_select(2, identity_rows))
                for text, identity in self.projected
            ),
            scale=self.scale.repeat(len(branches))[:, None, None, None],
            images=self.images,
            chains=chains,
            speaks=self.speaks,
        )
        return self.selected


def _heads(x: Tensor, heads: int) -> Tensor:
    """[rows, tokens, heads x d] -> [rows, heads, tokens, d]."""
    return x.reshape(*x.shape[:-1], heads, -1).transpose(1, 2)


class IdentityAttnProcessor(IPAdapterAttnProcessor2_0):  # type: ignore[misc]
    """Decoupled cross-attention whose conditions and manipulation come with the call, as `Rows`.

    Takes over the adapter's projections of a loaded `IPAdapterAttnProcessor2_0`; copies no weight, keeps no
    state. `group` and `index` say where `Rows.projected` holds the layer's keys and values.
    """

    def __init__(self, loaded: IPAdapterAttnProcessor2_0, block: Block, group: int, index: int) -> None:
        # Not the parent's constructor: it would allocate projections only to have them replaced.
        torch.nn.Module.__init__(self)
        self.hidden_size, self.cross_attention_dim = loaded.hidden_size, loaded.cross_attention_dim
        self.num_tokens, self.scale = loaded.num_tokens, loaded.scale
        self.to_k_ip, self.to_v_ip = loaded.to_k_ip, loaded.to_v_ip
        self.block: Block = block
        self.group, self.index = group, index

    def project(self, attn: AttentionLayer, text: Tensor, identity: Tensor) -> list[list[Tensor]]:
        """Key and value of the text, key and value of the identity: [rows, heads, tokens, d] each."""
        return [
            [_heads(to(text), attn.heads) for to in (attn.to_k, attn.to_v)],
            [_heads(to(identity), attn.heads) for to in (self.to_k_ip[0], self.to_v_ip[0])],
        ]

    def __call__(
        self,
        attn: AttentionLayer,
        hidden_states: Tensor,
        encoder_hidden_states: Rows | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend to text and identity.

        Args:
            attn: the cross-attention layer, as SDXL builds it (no norms, no residual of its own).
            hidden_states: [rows, positions, width].
            encoder_hidden_states: what the rows attend to.
            attention_mask: must be None, as it is in SDXL.
            temb: unused.
        """
        rows = encoder_hidden_states
        if rows is None or attention_mask is not None:
            raise ValueError("identity attention takes rows and no attention mask")
        query = _heads(attn.to_q(hidden_states), attn.heads)
        if rows.projected:
            text, identity = rows.projected[self.group]
            text_key, text_value = text[0, self.index], text[1, self.index]
            key, value = identity[0, self.index], identity[1, self.index]
        else:
            (text_key, text_value), (key, value) = self.project(attn, rows.text, rows.identity)
        out = F.scaled_dot_product_attention(query, text_key, text_value)
        if rows.speaks:
            chain = rows.chains.get(self.block)
            found = identity_attention(query, key, value, chain, rows.images)
            out = out + rows.scale.to(out.dtype) * found
        hidden_states = out.transpose(1, 2).flatten(2)
        projected: Tensor = attn.to_out[0](hidden_states)
        return projected  # to_out[1] is dropout, which does nothing at inference


def block_of(name: str) -> Block:
    """The part of the UNet that a layer belongs to, by its dotted name."""
    return "down" if name.startswith("down") else "up" if name.startswith("up") else "mid"


Layers: TypeAlias = Sequence[tuple[Block, AttentionLayer]]


def identity_layers(unet: torch.nn.Module) -> Layers:
    """The cross-attention layers that hold an adapter, each with the part of the UNet it belongs to."""
    return [
        (block_of(name), layer)
        for name, layer in unet.named_modules()
        if isinstance(getattr(layer, "processor", None), IPAdapterAttnProcessor2_0)
    ]


def processors(layers: Layers) -> list[IdentityAttnProcessor]:
    """One for each layer, with what is loaded there; layers of one shape form a group."""
    groups: dict[tuple[int, int], list[int]] = {}
    made = []
    for position, (block, layer) in enumerate(layers):
        members = groups.setdefault((layer.heads, layer.inner_kv_dim), [])
        group = list(groups).index((layer.heads, layer.inner_kv_dim))
        made.append(IdentityAttnProcessor(layer.processor, block, group, len(members)))
        members.append(position)
    return made


def projections(layer: AttentionLayer, processor: IdentityAttnProcessor) -> list[torch.nn.Module]:
    """The weights behind a layer's keys and values: needed by `project` alone."""
    return [layer.to_k, layer.to_v, processor.to_k_ip, processor.to_v_ip]


def project(
    layers: Layers,
    made: Sequence[IdentityAttnProcessor],
    text: Tensor,
    identity: Tensor,
    there: Callable[..., AbstractContextManager[None]] = lambda *_: nullcontext(),
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Keys and values of all layers, to be computed once a run, as `Rows.projected` has them.

    `there` is entered with a layer's projections around their use.
    """
    groups: dict[int, list[list[list[Tensor]]]] = {}
    for (_, layer), processor in zip(layers, made, strict=True):
        with there(*projections(layer, processor)):
            groups.setdefault(processor.group, []).append(processor.project(layer, text, identity))
    return tuple(
        (_stacked([of_text for of_text, _ in found]), _stacked([of_person for _, of_person in found]))
        for found in groups.values()
    )


def _stacked(found: list[list[Tensor]]) -> Tensor:
    """Keys and values of every layer -> [2, layers, rows, heads, tokens, d]."""
    return torch.stack([torch.stack(kind) for kind in zip(*found, strict=True)])


@contextmanager
def installed(layers: Layers, made: Sequence[IdentityAttnProcessor]) -> Iterator[None]:
    """For the time of the context the layers attend to `Rows`; then all is as before.

    Args:
        layers: of `identity_layers`, found once: walking through a UNet takes longer than a small step.
        made: of `processors`, made once: a compiled step is bound to them.
    """
    before = [layer.processor for _, layer in layers]
    try:
        for (_, layer), processor in zip(layers, made, strict=True):
            layer.processor = processor
        yield
    finally:
        for (_, layer), loaded in zip(layers, before, strict=True):
            layer.processor = loaded
