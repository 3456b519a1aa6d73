"""Decoupled cross-attention in the UNet: the attention processor and its conditions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention as AttentionLayer
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import Tensor

from ..recipe.schema import Block
from . import attention
from .guidance import Branch

Projected: TypeAlias = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values of text and identity by group of layers, [2, layers, rows, heads, tokens, d] each."""

Extra: TypeAlias = Callable[[Tensor, Tensor, "Rows"], Mapping[str, Any]]
"""Further arguments of a UNet call, from its latents [rows, C, h, w], the timestep [] and its rows."""


@dataclass(frozen=True)
class Rows:
    """Conditions of the rows of one UNet call; the UNet passes them on as `encoder_hidden_states`."""

    text: Tensor
    """[rows, tokens, width]"""
    pooled: Tensor
    """[rows, width]: pooled text embeddings."""
    time_ids: Tensor
    """[rows, 6]: sizes and crop."""
    identity: Tensor
    """[rows, identity tokens, width]"""
    projected: Projected
    """Empty if every layer projects its own keys and values."""
    scale: Tensor
    """[rows, 1, 1, 1]: adapter scale."""
    images: int
    chains: attention.Chains
    has_identity: bool
    """False skips identity attention."""
    extra: Extra | None
    """Further conditioning of the adapter, such as a ControlNet."""


@dataclass(frozen=True)
class Conditions:
    """Conditions of all images of a batch, with and without identity and prompt."""

    text: Tensor
    """[2 x images, tokens, width]: negative prompts of all images, then prompts."""
    pooled: Tensor
    """[2 x images, width]: pooled text embeddings in the same order."""
    time_ids: Tensor
    """[1, 6]: sizes and crop, the same for every image."""
    identity: Tensor
    """[2 x images, identity tokens, width]: no identity for all images, then the identities."""
    scale: Tensor
    """[steps, images]: adapter scale of each image."""
    has_identity: Sequence[bool]
    """For each step, False if every adapter scale is 0: identity attention is then skipped."""
    images: int
    projected: Projected = ()
    """Result of `project`; empty if every UNet call projects again."""
    extra: Extra | None = None
    """Further conditioning of the adapter in every step."""

    def select(self, branches: Sequence[Branch], chains: attention.Chains, step: int) -> Rows:
        """Gather the rows of the UNet call of a step over `branches` under a manipulation."""
        image, device = torch.arange(self.images), self.text.device
        identity_rows = torch.cat([image + self.images * branch.identity for branch in branches]).to(device)
        text_rows = torch.cat([image + self.images * branch.prompt for branch in branches]).to(device)
        return Rows(
            text=self.text[text_rows],
            pooled=self.pooled[text_rows],
            time_ids=self.time_ids.expand(len(branches) * self.images, -1),
            identity=self.identity[identity_rows],
            projected=tuple(
                (text.index_select(2, text_rows), identity.index_select(2, identity_rows))
                for text, identity in self.projected
            ),
            scale=self.row_scale(step, len(branches)),
            images=self.images,
            chains=chains,
            has_identity=self.has_identity[step],
            extra=self.extra,
        )

    def row_scale(self, step: int, branches: int) -> Tensor:
        """Return the adapter scale of each row in a step, [rows, 1, 1, 1]."""
        return self.scale[step].repeat(branches)[:, None, None, None]


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[rows, tokens, heads x d] -> [rows, heads, tokens, d]."""
    return x.reshape(*x.shape[:-1], heads, -1).transpose(1, 2)


class IdentityAttnProcessor(IPAdapterAttnProcessor2_0):  # type: ignore[misc]
    """Decoupled cross-attention that receives conditions and manipulation with each call, as `Rows`.

    Shares the adapter's projections with a loaded `IPAdapterAttnProcessor2_0`: no weight is copied, and no
    state is kept. `group` and `index` locate the layer's keys and values in `Rows.projected`.
    """

    def __init__(self, loaded: IPAdapterAttnProcessor2_0, block: Block, group: int, index: int) -> None:
        # The constructor of the parent class would allocate projections.
        torch.nn.Module.__init__(self)
        self.hidden_size, self.cross_attention_dim = loaded.hidden_size, loaded.cross_attention_dim
        self.num_tokens, self.scale = loaded.num_tokens, loaded.scale
        self.to_k_ip, self.to_v_ip = loaded.to_k_ip, loaded.to_v_ip
        self.block: Block = block
        self.group, self.index = group, index

    def project(self, attn: AttentionLayer, text: Tensor, identity: Tensor) -> list[list[Tensor]]:
        """Return key and value of the text, and of the identity: [rows, heads, tokens, d] each."""
        return [
            [_split_heads(to(text), attn.heads) for to in (attn.to_k, attn.to_v)],
            [_split_heads(to(identity), attn.heads) for to in (self.to_k_ip[0], self.to_v_ip[0])],
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
            encoder_hidden_states: conditions of the rows.
            attention_mask: must be None, as it is in SDXL.
            temb: unused.
        """
        rows = encoder_hidden_states
        if rows is None or attention_mask is not None:
            raise ValueError("identity attention requires rows and no attention mask")
        query = _split_heads(attn.to_q(hidden_states), attn.heads)
        if rows.projected:
            text, identity = rows.projected[self.group]
            text_key, text_value = text[0, self.index], text[1, self.index]
            key, value = identity[0, self.index], identity[1, self.index]
        else:
            (text_key, text_value), (key, value) = self.project(attn, rows.text, rows.identity)
        out = F.scaled_dot_product_attention(query, text_key, text_value)
        if rows.has_identity:
            out = out + rows.scale.to(out.dtype) * self.identity_term(query, key, value, out, rows)
        # to_out[1] is dropout, which does nothing at inference.
        projected: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2))
        return projected

    def identity_term(self, query: Tensor, key: Tensor, value: Tensor, text: Tensor, rows: Rows) -> Tensor:
        """Return the term that is added to text attention, before the adapter scale.

        Args:
            query: [rows, heads, positions, d].
            key, value: of the identity tokens, [rows, heads, tokens, d].
            text: text attention, [rows, heads, positions, d].
            rows: conditions of the rows.
        """
        return attention.identity_attention(query, key, value, rows.chains.get(self.block), rows.images)


Layers: TypeAlias = Sequence[tuple[Block, AttentionLayer]]


def block_of(name: str) -> Block:
    """Return the part of the UNet that contains a layer, by its dotted name."""
    return "down" if name.startswith("down") else "up" if name.startswith("up") else "mid"


def identity_layers(unet: torch.nn.Module) -> Layers:
    """Return the cross-attention layers with an adapter, each with its part of the UNet."""
    return [
        (block_of(name), layer)
        for name, layer in unet.named_modules()
        if isinstance(getattr(layer, "processor", None), IPAdapterAttnProcessor2_0)
    ]


def identity_processors(layers: Layers) -> list[IdentityAttnProcessor]:
    """Create a processor for each layer from the adapter in it; layers of equal shape form a group."""
    sizes: dict[tuple[int, int], int] = {}
    processors = []
    for block, layer in layers:
        shape = (layer.heads, layer.inner_kv_dim)
        index = sizes.setdefault(shape, 0)
        processors.append(IdentityAttnProcessor(layer.processor, block, list(sizes).index(shape), index))
        sizes[shape] += 1
    return processors


def projections(layer: AttentionLayer, processor: IdentityAttnProcessor) -> list[torch.nn.Module]:
    """Return the weights of the keys and values of a layer, which only `project` needs."""
    return [layer.to_k, layer.to_v, processor.to_k_ip, processor.to_v_ip]


def project(
    layers: Layers,
    processors: Sequence[IdentityAttnProcessor],
    text: Tensor,
    identity: Tensor,
    on_device: Callable[..., AbstractContextManager[None]] = lambda *_: nullcontext(),
) -> Projected:
    """Compute the keys and values of all layers, once per batch.

    `on_device` is entered with a layer's projections around their use.
    """
    groups: dict[int, list[list[list[Tensor]]]] = {}
    for (_, layer), processor in zip(layers, processors, strict=True):
        with on_device(*projections(layer, processor)):
            groups.setdefault(processor.group, []).append(processor.project(layer, text, identity))
    return tuple(
        (_stacked([of_text for of_text, _ in group]), _stacked([of_identity for _, of_identity in group]))
        for group in groups.values()
    )


def _stacked(keys_values: list[list[Tensor]]) -> Tensor:
    """Keys and values of every layer -> [2, layers, rows, heads, tokens, d]."""
    return torch.stack([torch.stack(kind) for kind in zip(*keys_values, strict=True)])


@contextmanager
def installed(layers: Layers, processors: Sequence[IdentityAttnProcessor]) -> Iterator[None]:
    """Let the layers attend to `Rows` inside the context; restore their processors afterwards.

    Args:
        layers: result of `identity_layers`; kept, because traversing a UNet is slower than a small step.
        processors: result of `identity_processors`; kept, because a compiled step is bound to them.
    """
    before = [layer.processor for _, layer in layers]
    try:
        for (_, layer), processor in zip(layers, processors, strict=True):
            layer.processor = processor
        yield
    finally:
        for (_, layer), loaded in zip(layers, before, strict=True):
            layer.processor = loaded
