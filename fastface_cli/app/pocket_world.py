"""How far a photo is from those that the pocket stack was trained with."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import pocket

if TYPE_CHECKING:
    from torch import Tensor

    from ..identity.identity import Identity

FILE = Path(pocket.__file__).with_name("world.safetensors")
"""`mean` [width] and `inverse_covariance` [width, width] of `features`, made by `training.world`."""
FAR = 16.0
"""Above it, a photo is reported. Of 200 held-out portraits the farthest is at 14.6; an astronaut in a bright
suit is at 17.6, and two of the six faces of a group photo at 25 (`python -m training.world`)."""


def features(encoder: Any, identity: Identity) -> Tensor:
    """The mean state of the image encoder over the crop of a person, [width]."""
    import torch

    from ..adapters.faceid_plusv2 import crop_features, crop_processor

    with torch.inference_mode():
        states = crop_features(identity, encoder, crop_processor(encoder), "bgr", lambda *_: nullcontext())
    return states[1].float().mean(0).cpu()


def distance(encoder: Any, identity: Identity) -> float:
    """The Mahalanobis distance of a person's crop from the portraits of the training."""
    from safetensors.torch import load_file

    known = load_file(FILE)
    off = features(encoder, identity) - known["mean"]
    return float((off @ known["inverse_covariance"] @ off).clamp_min(0).sqrt())
