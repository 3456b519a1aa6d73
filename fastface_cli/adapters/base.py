"""The interface between an identity adapter and the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor

from ..sampling.processor import (
    Extra,
    IdentityAttnProcessor,
    Layers,
    identity_layers,
    identity_processors,
)

if TYPE_CHECKING:
    from ..identity.identity import Identity
    from ..recipe.schema import Adapter

OnDevice: TypeAlias = Callable[..., AbstractContextManager[None]]
"""Entered with modules around their use: offloaded modules are moved to the device for that time."""


class IdentityAdapter(Protocol):
    """An identity adapter.

    Decoupled guidance needs predictions with and without identity; attention manipulation needs identity
    tokens with attention of their own. Everything else about an adapter stays behind this interface.
    """

    num_tokens: int
    """Identity tokens, which attention manipulation selects by number."""

    def configured(self, settings: Adapter) -> IdentityAdapter:
        """Return the adapter with the settings of a recipe."""

    def example(self) -> Identity:
        """Return an arbitrary identity with everything that the adapter reads, for warm-up and benchmarks."""

    def tokens(self, identity: Identity, on_device: OnDevice) -> tuple[Tensor, Tensor]:
        """Encode no identity and a person: [num_tokens, width] each."""

    def attention(self, unet: torch.nn.Module) -> tuple[Layers, list[IdentityAttnProcessor]]:
        """Return the layers of a UNet that attend to the tokens, and a processor for each."""

    def extra_conditioning(
        self, identities: Sequence[Identity], size: tuple[int, int], on_device: OnDevice
    ) -> Extra | None:
        """Return further conditioning of a batch in every step, such as a ControlNet; None if there is none.

        Args:
            identities: of each image of the batch.
            size: width and height of the images, in pixels.
            on_device: entered with a module around its use in a step.
        """


class DecoupledAdapter:
    """Defaults of most adapters: identity enters through decoupled cross-attention in every such layer."""

    def example(self) -> Identity:
        """See `IdentityAdapter`."""
        from ..identity.identity import random_identity

        return random_identity()

    def attention(self, unet: torch.nn.Module) -> tuple[Layers, list[IdentityAttnProcessor]]:
        """See `IdentityAdapter`."""
        layers = identity_layers(unet)
        return layers, identity_processors(layers)

    def extra_conditioning(
        self, identities: Sequence[Identity], size: tuple[int, int], on_device: OnDevice
    ) -> Extra | None:
        """Return None: identity enters through attention alone."""
        return None
