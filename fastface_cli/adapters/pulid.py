"""PuLID: identity tokens from an embedding and image features, with attention orthogonal to that of the text.

Source: ToTheBeginning/PuLID, for SDXL. Additional zero tokens reduce the attention to the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import Tensor

from ..errors import NoFaceError
from ..quiet import loading_errors
from ..recipe.schema import Adapter
from ..sampling import attention
from ..sampling.processor import (
    IdentityAttnProcessor,
    Layers,
    Rows,
)
from .base import DecoupledAdapter, OnDevice
from .pulid_encoder import ID_TOKENS, EncoderV1, EncoderV11

if TYPE_CHECKING:
    from ..identity.identity import Identity

ENCODER, LAYERS = "id_adapter.", "id_adapter_attn_layers."
"""Prefixes of the encoder and of the keys and values in a published file."""


@dataclass
class Pulid(DecoupledAdapter):
    """The adapter's encoder; its keys and values are in the UNet."""

    encoder: EncoderV1 | EncoderV11
    zero_tokens: int = 0
    orthogonal: str = "off"
    num_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_tokens = self.encoder.queries

    def configured(self, settings: Adapter) -> Pulid:
        """See `IdentityAdapter`."""
        return replace(self, zero_tokens=settings.zero_tokens, orthogonal=settings.orthogonal)

    def tokens(self, identity: Identity, on_device: OnDevice) -> tuple[Tensor, Tensor]:
        """Encode no identity (zeros for all inputs) and a person: [tokens, width] each.

        v1.1 encodes all photos together; with v1, the tokens of the photos are averaged.

        Raises:
            NoFaceError: the features were computed by another image tower.
        """
        norms = identity.features["embedding_norm"][:, None]
        embedding = np.concatenate(
            [identity.id_embedding * norms, _unit(identity.features["eva_embedding"])], axis=1
        )
        hidden = identity.features["eva_hidden"]
        expected = self.encoder.inputs
        if (embedding.shape[1], hidden.shape[-1]) != expected:
            raise NoFaceError(
                f"the EVA features of the identity have width {hidden.shape[-1]}, not {expected[1]}",
                "make it again from the photo with this recipe: --face PHOTO --save-identity FILE",
            )
        with on_device(self.encoder):
            parameter = next(self.encoder.parameters())
            inputs = torch.from_numpy(embedding).to(parameter.device, parameter.dtype)
            states = torch.from_numpy(hidden).to(parameter.device, parameter.dtype).unbind(1)
            absent = self.encoder(torch.zeros_like(inputs[:1]), [torch.zeros_like(s[:1]) for s in states])
            person = self.encoder(inputs, states)
        weight = torch.from_numpy(identity.weight / identity.weight.sum()).to(person.device, person.dtype)
        return absent[0], person[0] if len(person) == 1 else torch.einsum("n,ntw->tw", weight, person)

    def example(self) -> Identity:
        """See `IdentityAdapter`."""
        from ..identity.analyzer import EMBEDDING
        from ..identity.identity import random_identity

        embedding, hidden = self.encoder.inputs
        return random_identity(eva=(embedding - EMBEDDING, hidden))

    def attention(self, unet: torch.nn.Module) -> tuple[Layers, list[IdentityAttnProcessor]]:
        """See `IdentityAdapter`: with the orthogonal projection."""
        layers, plain = super().attention(unet)
        return layers, [PulidAttnProcessor(each, self.zero_tokens, self.orthogonal) for each in plain]


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: np.ndarray = vectors / np.maximum(norms, np.finfo(np.float32).tiny)
    return unit.astype(np.float32)


class PulidAttnProcessor(IdentityAttnProcessor):
    """Identity attention with zero tokens and the orthogonal projection of PuLID."""

    def __init__(self, plain: IdentityAttnProcessor, zero_tokens: int, orthogonal: str) -> None:
        super().__init__(plain, plain.block, plain.group, plain.index)
        self.zero_tokens, self.orthogonal = zero_tokens, orthogonal

    def identity_term(self, query: Tensor, key: Tensor, value: Tensor, text: Tensor, rows: Rows) -> Tensor:
        """See `IdentityAttnProcessor`."""
        if self.zero_tokens:  # keys and values have no bias, so those of a zero token are zero
            none = key.new_zeros(*key.shape[:2], self.zero_tokens, key.shape[-1])
            key, value = torch.cat([key, none], dim=2), torch.cat([value, none], dim=2)
        out = attention.identity_attention(query, key, value, rows.chains.get(self.block), rows.images)
        if self.orthogonal == "off":
            return out
        shared = along(out.float(), text.float())
        if self.orthogonal == "ortho":
            return (out.float() - shared).to(out.dtype)
        kept = first_tokens_share(query, key)
        return (out.float() + (kept - 1) * shared).to(out.dtype)


def along(vector: Tensor, direction: Tensor) -> Tensor:
    """Project `vector` on `direction`, over positions and per channel; 0 where the direction is 0.

    Args:
        vector, direction: [rows, heads, positions, d] float32.
    """
    length = (direction * direction).sum(-2, keepdim=True)
    share = (vector * direction).sum(-2, keepdim=True) / torch.where(length == 0, 1, length)
    return share * direction


def first_tokens_share(query: Tensor, key: Tensor) -> Tensor:
    """Return the attention to the first five tokens, mean over heads: [rows, 1, positions, 1] float32.

    The scores are not divided by sqrt(d), as in the published code.
    """
    scores = (query.float() @ key.float().transpose(-2, -1)).softmax(dim=-1)
    return scores[..., :ID_TOKENS].sum(-1, keepdim=True).mean(dim=1, keepdim=True)


def load_pulid(
    pipe: StableDiffusionXLPipeline, file: Path, lora_scale: float, *, fuse: bool = True
) -> torch.nn.Module:
    """Load the keys and values of a file into the UNet of a pipeline; return its encoder.

    These files have no LoRA: `lora_scale` and `fuse` have no effect.

    Raises:
        ModelUnavailableError: the file has another layout.
    """
    with loading_errors("identity adapter", file):
        state = _read(file)
        unet: Any = pipe.unet
        encoder = empty_pulid(_part(state, ENCODER))
        encoder.load_state_dict(_part(state, ENCODER), strict=True, assign=True)
        weights = _part(state, LAYERS)
        processors = dict(unet.attn_processors)
        for number, name in enumerate(processors):
            if not name.endswith("attn2.processor"):
                continue
            key, value = (weights.pop(f"{number}.{half}.weight") for half in ("id_to_k", "id_to_v"))
            processor = IPAdapterAttnProcessor2_0(key.shape[0], key.shape[1], num_tokens=[ID_TOKENS])
            processor.to_k_ip[0].weight.data, processor.to_v_ip[0].weight.data = key, value
            processors[name] = processor.to(unet.device, unet.dtype)
        if weights:
            raise ValueError(f"it has {len(weights)} tensors for layers that the UNet does not have")
        unet.set_attn_processor(processors)
        return encoder.eval()


def empty_pulid(state: Mapping[str, Tensor]) -> EncoderV1 | EncoderV11:
    """Create the encoder on the meta device, with the shapes of a state."""
    with torch.device("meta"):
        return EncoderV11(state) if "latents" in state else EncoderV1(state)


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(file)
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not any(str(name).startswith(LAYERS) for name in state):
        raise ValueError("it is not a PuLID file")
    return state
