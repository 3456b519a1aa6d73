"""Store fused models in one file, so that the next start does not fuse them again.

A file contains the UNet with all LoRAs fused and the keys and values of the adapter (`unet.NAME`), the
identity projection (`projection.NAME`), and the text encoders that a LoRA changed. Its metadata contains the
configuration of the UNet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from safetensors import safe_open
from torch import Tensor

from ..adapters.registry import ADAPTERS
from ..recipe.schema import Recipe
from ..store.fused_cache import FusedCache
from .tensor_file import TensorLayout, safetensors_length, safetensors_pieces


@dataclass
class FusedModels:
    """Models with all LoRAs fused."""

    unet: UNet2DConditionModel
    projection: torch.nn.Module
    text_encoders: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """State of the text encoders that a LoRA changed, by name."""

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by their name in the file."""
        parts: dict[str, Mapping[str, Tensor]] = {
            "unet": self.unet.state_dict(),
            "projection": self.projection.state_dict(),
            **self.text_encoders,
        }
        return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}


def keep(
    cache: FusedCache, key: str, recipe: Recipe, inputs: Mapping[str, list[Path]], models: FusedModels
) -> Path | None:
    """Store fused models for the next start; a failure is only logged.

    Args:
        cache: stores the file.
        key, inputs: see `store.fused_cache`.
        recipe: whose models they are.
        models: on any device.
    """
    tensors = models.tensors()
    config = {name: value for name, value in models.unet.config.items() if not name.startswith("_")}
    layout = TensorLayout(
        {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()},
        {"format": "pt", "unet": json.dumps(config), "adapter": recipe.adapter.kind},
    )

    def write(file: BinaryIO) -> str:
        digest = hashlib.sha256()
        for piece in safetensors_pieces(layout, lambda name: tensors[name].detach().cpu()):
            digest.update(piece)
            file.write(piece)
        return digest.hexdigest()

    scales = [f"{role} {files[0].name}" for role, files in inputs.items() if role != "base"]
    description = [*scales, f"lora_scale {recipe.adapter.lora_scale:g}"]
    return cache.keep(key, recipe.name, description, safetensors_length(layout), write)


@dataclass
class Content:
    """The content of a file."""

    config: dict[str, object]
    """Configuration of the UNet."""
    adapter: str
    """Kind of the adapter."""
    parts: dict[str, dict[str, Tensor]]
    """State of each part, by name."""


def read(path: Path, device: torch.device) -> Content:
    """Read a file to a device; on the CPU it is memory-mapped.

    Raises:
        Exception: the file is damaged or has another layout.
    """
    with safe_open(path, framework="pt", device=str(device)) as file:
        metadata = file.metadata()
        config = json.loads(metadata["unet"])
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in file.get_tensors().items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
    return Content(config, metadata["adapter"], parts)


def build(content: Content) -> FusedModels:
    """Create models from the content of a file.

    Must not run while another thread loads models: diffusers' loaders put every parameter that any thread
    creates meanwhile on the meta device (`accelerate.init_empty_weights`).

    Raises:
        Exception: the content has another layout.
    """
    parts = dict(content.parts)
    unet = _filled(_empty_unet(content.config, parts["unet"]), parts.pop("unet"))
    empty = ADAPTERS[content.adapter].empty_projection(parts["projection"])  # type: ignore[index]
    projection = _filled(empty, parts.pop("projection"))
    return FusedModels(unet, projection, parts)


def _filled(module: torch.nn.Module, state: Mapping[str, Tensor]) -> torch.nn.Module:
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def _empty_unet(config: Mapping[str, object], state: Mapping[str, Tensor]) -> UNet2DConditionModel:
    """Create the UNet on the meta device, with the adapter's processors for the keys of the state."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config))
        processors = dict(unet.attn_processors)
        for name in processors:
            weight = state.get(f"{name}.to_k_ip.0.weight")
            if weight is not None:
                processors[name] = IPAdapterAttnProcessor2_0(
                    hidden_size=weight.shape[0], cross_attention_dim=weight.shape[1], num_tokens=[4]
                )
        unet.set_attn_processor(processors)
    return unet
