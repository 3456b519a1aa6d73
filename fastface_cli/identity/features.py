"""What an identity holds beside the unit embedding and the crop, and which adapters need it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..errors import NoFaceError
from ..recipe.schema import AdapterName

if TYPE_CHECKING:
    from .identity import Identity

SHAPES: Mapping[str, tuple[int | None, ...]] = {
    "embedding_norm": (),
    "key_points": (5, 2),
    "photo_size": (2,),
    "eva_embedding": (None,),
    "eva_hidden": (5, None, None),
}
"""float32 arrays of an identity of n photos, by name: [n, ...] each, None where the encoder decides the size.
`embedding_norm`: length of the embedding before it was scaled to 1. `key_points` and `photo_size`: in pixels
of the upright photo. `eva_embedding` and `eva_hidden`: output and five hidden states of EVA02-CLIP."""

NEEDED: Mapping[AdapterName, tuple[str, ...]] = {
    "faceid_plusv2": (),
    "plus_face": (),
    "instantid": ("embedding_norm", "key_points", "photo_size"),
    "pulid_v1": ("embedding_norm", "eva_embedding", "eva_hidden"),
    "pulid_v1.1": ("embedding_norm", "eva_embedding", "eva_hidden"),
}
"""The features that each adapter reads."""

_FOREIGN: Mapping[AdapterName, tuple[str, ...]] = {
    "faceid_plusv2": ("glintr100", "none"),
    "plus_face": (),
    "instantid": ("w600k_r50", "none"),
    "pulid_v1": ("w600k_r50", "none"),
    "pulid_v1.1": ("w600k_r50", "none"),
}
"""Recognizers whose embeddings mean nothing to an adapter."""

_STEP = "make it again from the photo with this recipe: --face PHOTO --save-identity FILE"


def check_features(identity: Identity, kind: AdapterName) -> None:
    """Check that an identity holds what an adapter reads.

    Raises:
        NoFaceError: something is missing, or the embedding is of another recognizer.
    """
    missing = [name for name in NEEDED[kind] if name not in identity.features]
    if missing:
        raise NoFaceError(f"the identity lacks {', '.join(missing)}, which {kind} needs", _STEP)
    if identity.recognizer in _FOREIGN[kind]:
        raise NoFaceError(
            f"the embedding of the identity is from the recognizer {identity.recognizer}, "
            f"which {kind} was not trained with",
            _STEP,
        )


def check_shape(name: str, array: np.ndarray, n: int) -> str | None:
    """Return what is wrong with a feature of n photos, or None."""
    expected = (n, *SHAPES[name])
    fits = len(array.shape) == len(expected) and all(
        required in (None, side) for side, required in zip(array.shape, expected, strict=True)
    )
    if array.dtype != np.float32 or not fits:
        sides = ", ".join("any" if side is None else str(side) for side in expected)
        return f"{name} must be [{sides}] float32, not {list(array.shape)} {array.dtype.name}"
    return None if np.isfinite(array).all() else f"{name} contains numbers that are not finite"
