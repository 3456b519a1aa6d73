"""The supported identity adapters, one entry each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..recipe.schema import AdapterName
from .base import IdentityAdapter
from .faceid_plusv2 import FaceIDPlusV2, empty_projection, load_adapter
from .instantid import InstantID, load_controlnet
from .plus_face import PlusFace
from .plus_projection import empty_plus, load_plus
from .pulid import Pulid, empty_pulid, load_pulid

Extras = Mapping[str, torch.nn.Module]
"""Further models of an adapter, by role."""


@dataclass(frozen=True)
class AdapterKind:
    """The functions that load an adapter."""

    load: Callable[..., torch.nn.Module]
    """(pipeline of the base, file, lora_scale, fuse=...): put the attention weights into the UNet and return
    the projection, which runs once per image."""
    build: Callable[[Any, Any, Extras], IdentityAdapter]
    """(pipeline of the base, projection, further models): the adapter."""
    empty_projection: Callable[[Mapping[str, Tensor]], torch.nn.Module]
    """Create the projection on the meta device, with the shapes of a state: for the cache of fused models."""
    load_extras: Callable[[Mapping[str, Path], torch.dtype, Any], Extras] = lambda *_: {}
    """(paths of the recipe, dtype, UNet): further models, on the CPU."""


_PULID = AdapterKind(load_pulid, lambda _, encoder, __: Pulid(encoder), empty_pulid)

ADAPTERS: Mapping[AdapterName, AdapterKind] = {
    "faceid_plusv2": AdapterKind(
        load_adapter,
        lambda parts, projection, _: FaceIDPlusV2(parts.image_encoder, projection),
        empty_projection,
    ),
    "plus_face": AdapterKind(
        load_plus, lambda parts, projection, _: PlusFace(parts.image_encoder, projection), empty_plus
    ),
    "instantid": AdapterKind(
        load_plus,
        lambda _, projection, extras: InstantID(projection, extras["controlnet"]),
        empty_plus,
        load_controlnet,
    ),
    "pulid_v1": _PULID,
    "pulid_v1.1": _PULID,
}
"""By the `adapter.kind` of a recipe."""
