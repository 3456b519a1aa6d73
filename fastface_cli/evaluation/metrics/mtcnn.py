"""MTCNN (Zhang et al., arXiv 1604.02878), as facenet-pytorch runs its published weights: three small
networks, each looking closer at what the one before left. The published Face-CLIP score crops by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from PIL import Image

from ...identity.analyzer import Box

if TYPE_CHECKING:
    import torch

MIN_FACE = 20
"""Side in pixels of the smallest face looked for."""
SHRINK = 0.709
"""From one scale of the pyramid to the next: half the area."""
PROPOSE, REFINE, DECIDE = 0.6, 0.7, 0.7
"""Probability from which each network keeps a face."""
CELL, STRIDE = 12, 2
"""Side of what the first network sees at once, and how far apart it looks, in pixels of its scale."""
CHUNK = 512
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "pnet": {"conv1": (10, 3, 3, 3), "conv2": (16, 10, 3, 3), "conv3": (32, 16, 3, 3),
             "conv4_1": (2, 32, 1, 1), "conv4_2": (4, 32, 1, 1)},
    "rnet": {"conv1": (28, 3, 3, 3), "conv2": (48, 28, 3, 3), "conv3": (64, 48, 2, 2), "dense4": (128, 576),
             "dense5_1": (2, 128), "dense5_2": (4, 128)},
    "onet": {"conv1": (32, 3, 3, 3), "conv2": (64, 32, 3, 3), "conv3": (64, 64, 3, 3),
             "conv4": (128, 64, 2, 2), "dense5": (256, 1152), "dense6_1": (2, 256), "dense6_2": (4, 256),
             "dense6_3": (10, 256)},
}  # fmt: skip
"""Weights of each network; `prelu` layers have one number a channel."""

MtcnnWeights: TypeAlias = Mapping[str, "torch.Tensor"]
Network: TypeAlias = Callable[["torch.Tensor"], tuple[np.ndarray, np.ndarray]]


class Mtcnn:
    """Finds faces.

    Args:
        pnet, rnet, onet: state of each network, under its published names.
        device: where they run.

    Raises:
        ValueError: a weight is missing or of another shape.
    """

    def __init__(
        self, pnet: MtcnnWeights, rnet: MtcnnWeights, onet: MtcnnWeights, device: str = "cpu"
    ) -> None:
        self._device = device
        states = {"pnet": pnet, "rnet": rnet, "onet": onet}
        for name, state in states.items():
            _check(name, state)
        self._pnet, self._rnet, self._onet = (
            {name: tensor.to(device).float() for name, tensor in state.items()} for state in states.values()
        )

    def largest(self, image: Image.Image) -> Box | None:
        """The box of the largest face, in pixels, not cut at the edge of the image; None without a face."""
        boxes = self.find(image)
        if not len(boxes):
            return None
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        left, top, right, bottom = (float(side) for side in boxes[np.argsort(areas)[-1], :4])
        return left, top, right, bottom

    def find(self, image: Image.Image) -> np.ndarray:
        """Boxes and probabilities of all faces, [n, 5] float32."""
        import torch

        with torch.inference_mode():
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).to(self._device)
            pixels = pixels.permute(2, 0, 1)[None].float()
            boxes = self._propose(pixels)
            boxes, moves = self._look(pixels, boxes, 24, self._refine, REFINE)
            kept = suppress(boxes, 0.7)
            boxes = squared(moved(boxes[kept], moves[kept], 1))
            boxes, moves = self._look(pixels, boxes, 48, self._decide, DECIDE)
            boxes = moved(boxes, moves, 1)
            return np.asarray(boxes[suppress(boxes, 0.7, over="smaller")])

    def _propose(self, pixels: torch.Tensor) -> np.ndarray:
        """Squares that may be faces, over all scales."""
        height, width = pixels.shape[2:]
        candidates = [np.zeros((0, 9), np.float32)]
        scale = CELL / MIN_FACE
        while min(height, width) * scale >= CELL:
            size = (int(height * scale + 1), int(width * scale + 1))
            probability, moves = self._first(_scaled(pixels, size))
            rows, columns = np.nonzero(probability >= PROPOSE)
            place = np.stack([columns, rows], axis=1).astype(np.float32) * STRIDE
            corners = [
                np.floor((place + 1) / np.float32(scale)),
                np.floor((place + CELL) / np.float32(scale)),
            ]
            boxes = np.concatenate(
                [*corners, probability[rows, columns, None], moves[:, rows, columns].T], axis=1
            )
            candidates.append(boxes[suppress(boxes, 0.5)])
            scale *= SHRINK
        boxes = np.concatenate(candidates)
        boxes = boxes[suppress(boxes, 0.7)]
        return squared(moved(boxes[:, :5], boxes[:, 5:], 0))

    def _look(
        self, pixels: torch.Tensor, boxes: np.ndarray, side: int, network: Network, least: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """The boxes that a network keeps with its probabilities, [n, 5], and its moves of them, [n, 4]."""
        import torch

        height, width = pixels.shape[2:]
        crops, kept = [], []
        for index, box in enumerate(boxes):
            left, top, right, bottom = (int(side) for side in np.trunc(box[:4]))
            left, top, right, bottom = max(left, 1), max(top, 1), min(right, width), min(bottom, height)
            if bottom >= top and right >= left:
                crops.append(_scaled(pixels[:, :, top - 1 : bottom, left - 1 : right], (side, side)))
                kept.append(index)
        if not crops:
            return np.zeros((0, 5), np.float32), np.zeros((0, 4), np.float32)
        answers = [network(chunk) for chunk in torch.split(torch.cat(crops), CHUNK)]
        probability = np.concatenate([scores for scores, _ in answers])
        moves = np.concatenate([offsets for _, offsets in answers])
        sure = probability > least
        return np.column_stack([boxes[kept][sure, :4], probability[sure]]), moves[sure]

    def _first(self, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """[1, 3, h, w] -> probability [h', w'] and moves [4, h', w']."""
        from torch.nn import functional

        state = self._pnet
        x = _pooled(_convolved(x, state, 1), 2)
        x = _convolved(_convolved(x, state, 2), state, 3)
        chance = functional.conv2d(x, state["conv4_1.weight"], state["conv4_1.bias"]).softmax(dim=1)
        moves = functional.conv2d(x, state["conv4_2.weight"], state["conv4_2.bias"])
        return chance[0, 1].cpu().numpy(), moves[0].cpu().numpy()

    def _refine(self, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """[n, 3, 24, 24] -> probability [n] and moves [n, 4]."""
        x = _pooled(_convolved(x, self._rnet, 1), 3)
        x = _pooled(_convolved(x, self._rnet, 2), 3)
        return _judged(_convolved(x, self._rnet, 3), self._rnet, 4)

    def _decide(self, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """[n, 3, 48, 48] -> probability [n] and moves [n, 4]."""
        x = _pooled(_convolved(x, self._onet, 1), 3)
        x = _pooled(_convolved(x, self._onet, 2), 3)
        x = _pooled(_convolved(x, self._onet, 3), 2)
        return _judged(_convolved(x, self._onet, 4), self._onet, 5)


def moved(boxes: np.ndarray, moves: np.ndarray, extra: int) -> np.ndarray:
    """Boxes [n, 5] whose corners are moved by shares of their sides; `extra` is what a side has beyond the
    difference of its ends (the later networks count both end pixels)."""
    size = boxes[:, 2:4] - boxes[:, :2] + extra
    refined = boxes.copy()
    refined[:, :4] += moves * np.concatenate([size, size], axis=1)
    return refined


def squared(boxes: np.ndarray) -> np.ndarray:
    """Boxes [n, 5] made square around their middles, by their longer sides."""
    size = boxes[:, 2:4] - boxes[:, :2]
    longest = size.max(axis=1, keepdims=True) if len(boxes) else size[:, :1]
    square = boxes.copy()
    square[:, :2] += size * np.float32(0.5) - longest * np.float32(0.5)
    square[:, 2:4] = square[:, :2] + longest
    return square


def suppress(boxes: np.ndarray, most: float, over: Literal["union", "smaller"] = "union") -> np.ndarray:
    """Indices of boxes [n, 5 or more] to keep, likeliest first: each falls to a likelier one it overlaps by
    more than `most`.

    Args:
        over: what the overlap is a share of. `smaller`, of the last stage, counts both end pixels of a side
            and of equal probabilities, which are common there, takes the last.
    """
    smaller = over == "smaller"
    extra = int(smaller)
    low, high = boxes[:, :2], boxes[:, 2:4]
    areas = np.prod(high - low + extra, axis=1)
    chance = boxes[:, 4]
    left = np.argsort(chance, kind="stable")[::-1] if smaller else np.argsort(-chance, kind="stable")
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        sides = np.minimum(high[best], high[left]) - np.maximum(low[best], low[left]) + extra
        common = np.prod(np.maximum(sides, 0), axis=1)
        whole = np.minimum(areas[best], areas[left]) if smaller else areas[best] + areas[left] - common
        left = left[common <= most * whole]
    return np.array(kept, np.int64)


def _scaled(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Averaged down to a size, 0..255 brought to about [-1, 1]."""
    from torch.nn import functional

    return (functional.interpolate(pixels, size=size, mode="area") - 127.5) / 128


def _convolved(x: torch.Tensor, state: MtcnnWeights, number: int) -> torch.Tensor:
    from torch.nn import functional

    x = functional.conv2d(x, state[f"conv{number}.weight"], state[f"conv{number}.bias"])
    return functional.prelu(x, state[f"prelu{number}.weight"])


def _pooled(x: torch.Tensor, side: int) -> torch.Tensor:
    from torch.nn import functional

    return functional.max_pool2d(x, side, 2, ceil_mode=True)


def _judged(x: torch.Tensor, state: MtcnnWeights, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The dense end of the later networks. The weights were trained on channels last, columns before rows."""
    from torch.nn import functional

    def dense(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    x = dense(x.permute(0, 3, 2, 1).flatten(1), f"dense{number}")
    x = functional.prelu(x, state[f"prelu{number}.weight"])
    probability = dense(x, f"dense{number + 1}_1").softmax(dim=1)[:, 1]
    return probability.cpu().numpy(), dense(x, f"dense{number + 1}_2").cpu().numpy()


def _check(network: str, state: MtcnnWeights) -> None:
    for name, shape in SHAPES[network].items():
        if f"{name}.weight" not in state or tuple(state[f"{name}.weight"].shape) != shape:
            raise ValueError(f"{network} has no weight {name} of shape {list(shape)}")
        if f"{name}.bias" not in state:
            raise ValueError(f"{network} has no bias {name}")
