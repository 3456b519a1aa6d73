"""Low-rank additions to linear layers and convolutions with frozen weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """A frozen layer plus ``scale * up(down(x))``; up starts at zero, so the output is unchanged at first."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, scale: float = 1.0) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        if isinstance(layer, nn.Conv2d):
            kernel, stride, padding = layer.kernel_size, layer.stride, layer.padding
            self.down: nn.Module = nn.Conv2d(layer.in_channels, rank, kernel, stride, padding, bias=False)  # type: ignore[arg-type]
            self.up: nn.Module = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        assert isinstance(self.down.weight, Tensor)
        assert isinstance(self.up.weight, Tensor)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y + self.scale * self.up(self.down(x)) if self.enabled else y


def inject(model: nn.Module, endings: tuple[str, ...], rank: int, scale: float = 1.0) -> dict[str, LowRank]:
    """Wrap every layer whose dotted name has one of the endings; return the wrappers by name."""
    names = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and name.endswith(endings)
    ]
    wrapped: dict[str, LowRank] = {}
    for name in names:
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        wrapped[name] = LowRank(layer, rank, scale)
        # The last part of the name works for entries of a ModuleList and for attributes.
        parent._modules[leaf] = wrapped[name]
    return wrapped


class Additions(nn.Module):
    """The trained layers of wrappers, so that optimizer, average and checkpoint exclude the base."""

    def __init__(self, wrapped: dict[str, LowRank]) -> None:
        super().__init__()
        self.names = list(wrapped)
        self.downs = nn.ModuleList([wrapped[name].down for name in self.names])
        self.ups = nn.ModuleList([wrapped[name].up for name in self.names])

    def tensors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the detached (down, up) weights by layer name."""
        table = {}
        for name, down, up in zip(self.names, self.downs, self.ups, strict=True):
            assert isinstance(down.weight, torch.Tensor)
            assert isinstance(up.weight, torch.Tensor)
            table[name] = (down.weight.detach(), up.weight.detach())
        return table


def enable(wrapped: dict[str, LowRank], on: bool) -> None:
    """Enable or disable all additions, to run teacher and student with the same base weights."""
    for layer in wrapped.values():
        layer.enabled = on
