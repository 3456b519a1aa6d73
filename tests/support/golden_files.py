"""Files of the golden stack that are made from others: a plus-face adapter, and PuLID's image tower."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastface_cli.identity.eva import PREFIX, EvaConfig, EvaTower

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
TOWER = EvaConfig(side=56, width=32, depth=6, heads=1, hidden=85, output=24, taps=(1, 2, 3, 4, 5))
"""The shape that PuLID's golden adapter was made for: 16 patches of width 32, an embedding of 24 numbers."""


def random_tower(config: EvaConfig) -> EvaTower:
    """An image tower with random weights, always the same."""
    torch.manual_seed(0)
    tower = EvaTower(config).eval()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return tower


def write_tower(path: Path) -> None:
    """Write the image tower for PuLID's golden adapter, under its published names."""
    state = random_tower(TOWER).state_dict()
    save_file({PREFIX + name: tensor for name, tensor in state.items()}, path)


def write_plus_face(path: Path) -> None:
    """Write InstantID's golden file with a projection for the golden image encoder, in plus-face's format."""
    state = torch.load(GOLDEN / "instantid" / "ip-adapter.bin", weights_only=True)
    width = json.loads((GOLDEN / "clip" / "config.json").read_text())["hidden_size"]
    generator = torch.Generator().manual_seed(4)
    state["image_proj"]["proj_in.weight"] = torch.randn(128, width, generator=generator) / 8
    save_file({f"{part}.{name}": tensor for part, own in state.items() for name, tensor in own.items()}, path)
