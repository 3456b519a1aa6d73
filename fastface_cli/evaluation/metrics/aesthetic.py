"""Aesthetic score by the LAION aesthetic predictor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ModelUnavailableError
from ...scorers.clip import Clip
from .base import Column, Context, Needs, Sample, Scores
from .clip import CLIP_L14, hub_clip

if TYPE_CHECKING:
    import torch

WIDTHS = (768, 1024, 128, 64, 16, 1)
LAYERS = (0, 2, 4, 6, 7)
"""Where the linear layers stand in the trained sequence; dropout, which rests, stands between. There is no
other activation: together they are one linear map."""


def regression(state: Mapping[str, torch.Tensor], device: str) -> torch.nn.Sequential:
    """The regression from 768 numbers to one, in float32; ImageReward ends in the same one.

    Args:
        state: `layers.N.weight` and `layers.N.bias`.

    Raises:
        ValueError: other names or shapes.
    """
    import torch

    expected = {f"layers.{layer}.{part}" for layer in LAYERS for part in ("weight", "bias")}
    if set(state) != expected:
        raise ValueError(f"its weights are {', '.join(sorted(state)[:3])}, ..., not those of a predictor")
    linears = []
    for layer, inward, outward in zip(LAYERS, WIDTHS[:-1], WIDTHS[1:], strict=True):
        weight, bias = state[f"layers.{layer}.weight"], state[f"layers.{layer}.bias"]
        if weight.shape != (outward, inward) or bias.shape != (outward,):
            raise ValueError(f"layers.{layer} is {list(weight.shape)}, not [{outward}, {inward}]")
        with torch.device("meta"):
            linear = torch.nn.Linear(inward, outward)
        linear.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
        linear.bias = torch.nn.Parameter(bias.float(), requires_grad=False)
        linears.append(linear)
    return torch.nn.Sequential(*linears).eval().to(device)


def read_pickle(file: Path, what: str) -> Any:
    """Tensors from a PyTorch pickle, nothing of it executed.

    Raises:
        ModelUnavailableError: it does not load.
    """
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and PyTorch each have their own errors
        raise broken(file, what, error) from error


def broken(file: Path, what: str, error: Exception) -> ModelUnavailableError:
    """What to say of weights that do not load."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ModelUnavailableError(
        f"{what} in {file} does not load: {reason}", "fetch it again with: fastface download"
    )


class Aesthetic:
    """LAION aesthetic predictor on CLIP ViT-L/14, trained on AVA and LAION-Logos."""

    name = "aesthetic"
    summary = "LAION aesthetic predictor on CLIP ViT-L/14"
    columns = (
        Column(
            "aesthetic",
            "aesthetic",
            True,
            "",
            "Aesthetic score, about 1 to 10, that people are predicted to give (LAION, ava+logos).",
        ),
    )
    needs = Needs(artifacts=("aesthetic-ava-logos", CLIP_L14))
    clip: Clip
    _head: torch.nn.Sequential

    def load(self, context: Context) -> None:
        """See `Metric`."""
        file = context.paths["aesthetic-ava-logos"]
        state = read_pickle(file, "the aesthetic predictor")
        try:
            self._head = regression(state, context.device)
        except ValueError as error:
            raise broken(file, "the aesthetic predictor", error) from error
        self.clip = hub_clip(context, CLIP_L14)

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """See `Metric`."""
        vectors = self.clip.images([sample.image for sample in samples])
        return [{"aesthetic": float(value)} for value in predict(self._head, vectors)]


def predict(head: torch.nn.Sequential, vectors: np.ndarray) -> np.ndarray:
    """[n, 768] -> [n]."""
    import torch

    with torch.inference_mode():
        given = torch.from_numpy(vectors).to(next(head.parameters()).device)
        return np.asarray(head(given)[:, 0].cpu().numpy())
