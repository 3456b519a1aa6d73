"""Train an adapter with the layout of plus-face: sixteen tokens from the face crop, no embedding.

The loop and its losses are those of ``adapter``. The keys and values start from the trained FaceID adapter;
there is no LoRA, as in the published file, so the base alone must draw what the tokens ask for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from torch import Tensor, nn

from fastface_cli.adapters.plus_projection import HEAD_WIDTH
from training import clip, unet
from training.adapter import ADAPTER_SCALE, IdentityAttention, halved, paired, resampler_name, train
from training.common import load_part, options

CHECKPOINT = "plus_adapter.pt"
FILE = "ip-adapter-plus-face_pocket.bin"
TOKENS = 16
HIDDEN = 96
HEADS = 2
DEPTH = 4
"""As published; diffusers reads no other depth."""


class PlusAdapter(nn.Module):
    """The trained parameters; the base is not part of the module."""

    def __init__(self, base: Any, scale: float = ADAPTER_SCALE) -> None:
        super().__init__()
        self.projection = IPAdapterPlusImageProjection(
            embed_dims=clip.vision_config().hidden_size,
            output_dims=2 * clip.TEXT_WIDTH,
            hidden_dims=HIDDEN,
            depth=DEPTH,
            dim_head=HEAD_WIDTH,
            heads=HEADS,
            num_queries=TOKENS,
        )
        self.attention = IdentityAttention(base, TOKENS, scale)

    def tokens(self, embeddings: Tensor, states: Tensor) -> Tensor:
        """Return identity tokens [n, 16, 128] of states [n, 65, 96]; embeddings are not used."""
        tokens: Tensor = self.projection(states)
        return tokens

    def parameters_by_key(self) -> dict[str, dict[str, list[Tensor]]]:
        """Return parameters as `adapter.Adapter.parameters_by_key` does."""
        projection = {resampler_name(key): value for key, value in paired(self.projection).items()}
        return {"image_proj": projection, "ip_adapter": self.attention.by_key()}


def create(work: Path, base: Any) -> PlusAdapter:
    """Return an adapter whose keys and values are those of the trained FaceID adapter."""
    adapter = PlusAdapter(base)
    keys_and_values = {
        name.removeprefix("attention."): value
        for name, value in load_part(work / "adapter.pt", "ema").items()
        if name.startswith("attention.")
    }
    adapter.attention.load_state_dict(keys_and_values, strict=True)
    return adapter


def write(work: Path, size: int) -> Path:
    """Write the averaged weights as a plus-face file."""
    adapter = PlusAdapter(unet.build(size))
    adapter.load_state_dict(load_part(work / CHECKPOINT, "ema"), strict=True)
    torch.save(halved(adapter.parameters_by_key()), work / FILE)
    return work / FILE


def main() -> None:
    """Train within the time budget."""
    settings = options("plus_adapter", 75)
    train(settings, lambda base: create(settings.work, base), CHECKPOINT, order="rgb")
    write(settings.work, settings.size)


if __name__ == "__main__":
    main()
