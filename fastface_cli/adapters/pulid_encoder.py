"""The identity encoders of PuLID v1 and v1.1: an embedding and five hidden states to identity tokens.

Source: ToTheBeginning/PuLID. Parameter names and shapes are those of the published files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 5
"""Number of hidden states of the image tower."""
ID_TOKENS = 5
"""Tokens made from the embedding."""
HEAD_WIDTH = 64


def _mapping(into: int, middle: int, out: int, second: int | None = None) -> nn.Sequential:
    """Three linear layers, with normalization and LeakyReLU between them."""
    second = middle if second is None else second
    return nn.Sequential(
        nn.Linear(into, middle),
        nn.LayerNorm(middle),
        nn.LeakyReLU(),
        nn.Linear(middle, second),
        nn.LayerNorm(second),
        nn.LeakyReLU(),
        nn.Linear(second, out),
    )


class EncoderV1(nn.Module):
    """Five tokens from the embedding, and one from each hidden state."""

    queries = ID_TOKENS + LEVELS
    """Number of tokens returned."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        middle, into = state["body.0.weight"].shape
        self.width = state["mapping_0.6.weight"].shape[0]
        self.body = _mapping(into, middle, ID_TOKENS * self.width, state["body.3.weight"].shape[0])
        for level in range(LEVELS):
            for name in (f"mapping_{level}", f"mapping_patch_{level}"):
                inner, features = state[f"{name}.0.weight"].shape
                self.add_module(name, _mapping(features, inner, self.width))

    @property
    def inputs(self) -> tuple[int, int]:
        """Widths of the embedding and of the hidden states."""
        first: nn.Linear = self.get_submodule("body.0")  # type: ignore[assignment]
        second: nn.Linear = self.get_submodule("mapping_0.0")  # type: ignore[assignment]
        return first.in_features, second.in_features

    def forward(self, embedding: Tensor, hidden: Sequence[Tensor]) -> Tensor:
        """Encode people.

        Args:
            embedding: [people, width], face embedding and tower output side by side.
            hidden: five states [people, patches + 1, width], the class token first.

        Returns:
            [people, 10, width].
        """
        tokens = [self.body(embedding).reshape(len(embedding), ID_TOKENS, self.width)]
        for level, states in enumerate(hidden):
            of_class = self.get_submodule(f"mapping_{level}")(states[:, :1])
            of_patches = self.get_submodule(f"mapping_patch_{level}")(states[:, 1:])
            tokens.append(of_class + of_patches.mean(dim=1, keepdim=True))
        return torch.cat(tokens, dim=1)


class _Attention(nn.Module):
    """Learned tokens attend to the context and to themselves."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.heads = inner // HEAD_WIDTH
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        context, latents = self.norm1(context), self.norm2(latents)
        key, value = self.to_kv(torch.cat([context, latents], dim=1)).chunk(2, dim=-1)
        query, key, value = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.to_q(latents), key, value)
        )
        out = F.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return projected


class EncoderV11(nn.Module):
    """Learned tokens that attend to the embedding and, in five groups of layers, to one hidden state each."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        _, self.queries, self.width = state["latents"].shape
        self.latents = nn.Parameter(torch.empty(1, self.queries, self.width))
        self.proj_out = nn.Parameter(torch.empty(self.width, state["proj_out"].shape[1]))
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
        inner = state["layers.0.0.to_q.weight"].shape[0]
        wide = state["layers.0.1.1.weight"].shape[0]
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    _Attention(self.width, inner),
                    nn.Sequential(
                        nn.LayerNorm(self.width),
                        nn.Linear(self.width, wide, bias=False),
                        nn.GELU(),
                        nn.Linear(wide, self.width, bias=False),
                    ),
                ]
            )
            for _ in range(depth)
        )
        for level in range(LEVELS):
            inner, features = state[f"mapping_{level}.0.weight"].shape
            self.add_module(f"mapping_{level}", _mapping(features, inner, self.width))
        inner, into = state["id_embedding_mapping.0.weight"].shape
        self.id_embedding_mapping = _mapping(into, inner, ID_TOKENS * self.width)

    @property
    def inputs(self) -> tuple[int, int]:
        """Widths of the embedding and of the hidden states."""
        first: nn.Linear = self.get_submodule("id_embedding_mapping.0")  # type: ignore[assignment]
        second: nn.Linear = self.get_submodule("mapping_0.0")  # type: ignore[assignment]
        return first.in_features, second.in_features

    def forward(self, embedding: Tensor, hidden: Sequence[Tensor]) -> Tensor:
        """Encode one person from all photos.

        Args:
            embedding: [photos, width], face embedding and tower output side by side.
            hidden: five states [photos, patches + 1, width].

        Returns:
            [1, queries, width].
        """
        own = self.id_embedding_mapping(embedding).reshape(1, -1, self.width)
        latents = torch.cat([self.latents, own], dim=1)
        group = len(self.layers) // LEVELS
        for level, states in enumerate(hidden):
            features = self.get_submodule(f"mapping_{level}")(states.flatten(0, 1)[None])
            context = torch.cat([own, features], dim=1)
            for layer in list(self.layers)[level * group : (level + 1) * group]:
                latents = latents + layer.get_submodule("0")(context, latents)
                latents = latents + layer.get_submodule("1")(latents)
        return latents[:, : self.queries] @ self.proj_out
