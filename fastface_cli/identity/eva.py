"""The image tower of EVA02-CLIP, which PuLID reads: one embedding and five hidden states per face.

Source: EVA-02 (arXiv 2303.11331) in the form of `eva02_large_patch14_clip_336` of timm, whose parameter names
are used. It is written out here because timm requires a torchvision that fits the installed PyTorch build.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelUnavailableError

PREFIX = "visual.trunk."
"""Of the tower's tensors in an open_clip file."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's images, RGB in [0, 1]."""


@dataclass(frozen=True)
class EvaConfig:
    """The shape of a tower."""

    side: int = 336
    """Of the image in pixels."""
    patch: int = 14
    width: int = 1024
    depth: int = 24
    heads: int = 16
    hidden: int = 2730
    """Width inside the feed-forward network: 8/3 of `width`."""
    output: int = 768
    taps: tuple[int, ...] = (4, 8, 12, 16, 20)
    """The hidden states are the residual stream after so many blocks."""

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> EvaConfig:
        """The shape of the tower with these weights; heads are 64 wide, and the taps divide the depth.

        Raises:
            KeyError: a tensor is missing.
        """
        width = state["pos_embed"].shape[-1]
        patch = state["patch_embed.proj.weight"].shape[-1]
        grid = math.isqrt(state["pos_embed"].shape[1] - 1)
        depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        return cls(
            side=grid * patch,
            patch=patch,
            width=width,
            depth=depth,
            heads=max(1, width // 64),
            hidden=state["blocks.0.mlp.fc2.weight"].shape[1],
            output=state["head.weight"].shape[0],
            taps=tuple(max(1, depth * index // 6) for index in range(1, 6)),
        )


class _Attention(nn.Module):
    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = (
            to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for to in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(_rotated(query, rope), _rotated(key, rope), value)
        projected: Tensor = self.proj(self.norm(out.transpose(1, 2).flatten(2)))
        return projected


class _FeedForward(nn.Module):
    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.fc1_g = nn.Linear(config.width, config.hidden)
        self.fc1_x = nn.Linear(config.width, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, eps=1e-6)
        self.fc2 = nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.norm(F.silu(self.fc1_g(x)) * self.fc1_x(x)))
        return out


class _Block(nn.Module):
    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = _Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = _FeedForward(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn(self.norm1(x), rope)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class EvaTower(nn.Module):
    """The tower.

    Args:
        config: its shape.
    """

    def __init__(self, config: EvaConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or EvaConfig()
        tokens = (config.side // config.patch) ** 2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, config.width))
        # A dictionary for the name `patch_embed.proj`.
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, config.width, config.patch, config.patch)})
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.output)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode normalized images [n, 3, side, side].

        Returns:
            The embedding [n, output], and the hidden states [n, taps, tokens, width], class token first.
        """
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        rope = rotary_table(self.config, x.device)
        states = []
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, rope)
            if number in self.config.taps:
                states.append(x)
        embedding: Tensor = self.head(self.norm(x)[:, 0])
        return embedding, torch.stack(states, dim=1)


def rotary_table(config: EvaConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sine and cosine of the rotary position embedding: [patches, width of a head] each.

    Rows and columns have half of the frequencies each; positions are scaled to the grid of 16 by 16 on which
    the tower was first trained.
    """
    grid, bands = config.side // config.patch, config.width // config.heads // 4
    frequencies = 10000.0 ** -(torch.arange(bands, dtype=torch.float32, device=device) / bands)
    places = torch.arange(grid, dtype=torch.float32, device=device) / grid * 16
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    angles = torch.stack([rows, columns], dim=-1)[..., None] * frequencies
    angles = angles.flatten(0, 1).flatten(1).repeat_interleave(2, dim=-1)
    return angles.sin(), angles.cos()


def _rotated(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs of neighboring channels of every token but the first, [rows, heads, tokens, d]."""
    sine, cosine = rope
    patches = x[:, :, 1:]
    turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
    return torch.cat([x[:, :, :1], patches * cosine + turned * sine], dim=2)


@contextmanager
def visiting(tower: nn.Module, device: torch.device) -> Iterator[None]:
    """Move the tower to a device inside the context: 1.2 GB that the diffusion models need afterwards."""
    tower.to(device)
    try:
        yield
    finally:
        tower.to("cpu")


class FaceEncoder:
    """The tower with its weights, in float32: half precision would change the position embedding.

    Args:
        path: an open_clip .safetensors file.
        device: to run on; the weights are there only meanwhile.

    Raises:
        ModelUnavailableError: the file does not hold the tower.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(PREFIX)]  # noqa: SIM118
                state = {name.removeprefix(PREFIX): file.get_tensor(name).float() for name in names}
            with torch.device("meta"):
                tower = EvaTower(EvaConfig.of(state))
            tower.load_state_dict(state, assign=True)
        except (OSError, SafetensorError, RuntimeError, KeyError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise ModelUnavailableError(
                f"cannot load the image tower of EVA02-CLIP from {path}: {reason}",
                "download it again: fastface download",
            ) from error
        self.tower = tower.eval().requires_grad_(False)
        self.device = torch.device(device)

    def encode(self, face: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encode a face.

        Args:
            face: [side, side, 3] float32, RGB in [0, 1]; another size is scaled by bicubic interpolation.

        Returns:
            `eva_embedding` [output] and `eva_hidden` [taps, tokens, width], float32.
        """
        side = self.tower.config.side
        image = torch.from_numpy(face).permute(2, 0, 1)[None].to(self.device)
        if image.shape[-1] != side:
            # Without antialiasing, as the torchvision of PuLID's requirements (0.15) resizes tensors.
            image = F.interpolate(image, (side, side), mode="bicubic")
        mean, std = (torch.tensor(each, device=self.device).view(3, 1, 1) for each in (MEAN, STD))
        with torch.inference_mode(), visiting(self.tower, self.device):
            embedding, hidden = self.tower((image - mean) / std)
        return embedding[0].cpu().numpy(), hidden[0].cpu().numpy()
