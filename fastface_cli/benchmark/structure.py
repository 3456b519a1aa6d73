"""The layout of the adapter file and a vocabulary, to create models without a download.

Names and shapes come from the classes that load the file, created on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..models.tensor_file import Shape, TensorLayout
from .sdxl import BEGIN, END, ConfigFile, Stack


def layout_of(
    module: torch.nn.Module, dtype: torch.dtype, metadata: Mapping[str, str] | None
) -> TensorLayout:
    """Return the layout of a file with the tensors of a module."""
    return TensorLayout({name: (tuple(t.shape), dtype) for name, t in module.state_dict().items()}, metadata)


def empty_unet(config: ConfigFile) -> Any:
    """Create a UNet on the meta device, which allocates no memory."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def adapter_layout(stack: Stack, dtype: torch.dtype = torch.float16) -> TensorLayout:
    """Return the layout of the FaceID-PlusV2 adapter, named `image_proj.X` and `ip_adapter.X`.

    `ip_adapter` numbers the attention layers of the UNet in the order of its processors (down, up, mid). Each
    has a LoRA on q, k, v and out; cross-attention layers also have K and V for the identity.
    """
    unet, rank = empty_unet(stack.unet), stack.adapter_rank
    tensors: dict[str, tuple[Shape, torch.dtype]] = {
        f"image_proj.{name}": (shape, dtype) for name, shape in _projection(stack)
    }
    for index, name in enumerate(unet.attn_processors):
        layer = unet.get_submodule(name.removesuffix(".processor"))
        linears = {"to_q": layer.to_q, "to_k": layer.to_k, "to_v": layer.to_v, "to_out": layer.to_out[0]}
        for role, linear in linears.items():
            out, into = linear.weight.shape
            tensors[f"ip_adapter.{index}.{role}_lora.down.weight"] = ((rank, into), dtype)
            tensors[f"ip_adapter.{index}.{role}_lora.up.weight"] = ((out, rank), dtype)
        if layer.is_cross_attention:
            for role in ("to_k", "to_v"):
                shape = tuple(linears[role].weight.shape)
                tensors[f"ip_adapter.{index}.{role}_ip.weight"] = (shape, dtype)
    return TensorLayout(tensors)


def _projection(stack: Stack) -> Iterator[tuple[str, Shape]]:
    """Yield the tensors of the adapter's image projection, with the names of its file."""
    from diffusers.models.embeddings import IPAdapterFaceIDPlusImageProjection

    width = stack.unet["cross_attention_dim"]
    with torch.device("meta"):
        module = IPAdapterFaceIDPlusImageProjection(
            embed_dims=width,
            output_dims=width,
            hidden_dims=stack.image_encoder["hidden_size"],
            heads=max(width // 64, 1),
        )
    parts = {
        "ln0": "0.norm1",
        "ln1": "0.norm2",
        "attn.to_q": "0.to_q",
        "attn.to_k": "0.to_kv",
        "attn.to_out.0": "0.to_out",
        "ff.0": "1.0",
        "ff.1.net.0.proj": "1.1",
        "ff.1.net.2": "1.3",
    }
    for name, tensor in module.state_dict().items():
        shape = tuple(tensor.shape)
        stem, kind = name.rsplit(".", 1)
        if stem.startswith("layers."):
            _, layer, part = stem.split(".", 2)
            if part == "attn.to_v":  # stored with the keys
                continue
            if part == "attn.to_k":
                shape = (2 * shape[0], *shape[1:])
            yield f"perceiver_resampler.layers.{layer}.{parts[part]}.{kind}", shape
        elif stem in ("proj_in", "proj_out", "norm_out"):
            yield f"perceiver_resampler.{name}", shape
        else:
            yield {"proj.net.0.proj": "proj.0", "proj.net.2": "proj.2"}.get(stem, stem) + f".{kind}", shape


def byte_vocabulary(size: int) -> dict[str, int]:
    """Return the vocabulary of a CLIP tokenizer with single bytes and no merges.

    Args:
        size: number of tokens, at least 514; the last two begin and end a text, as published.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    words = letters + [f"{letter}</w>" for letter in letters]
    words += [f"<|unused{index}|>" for index in range(size - len(words) - 2)] + [BEGIN, END]
    return {word: index for index, word in enumerate(words)}
