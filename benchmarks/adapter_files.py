"""The layouts of the published files of InstantID, PuLID, plus-face and EVA02-CLIP, from names and shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.published_files import PT
from fastface_cli.benchmark.sdxl import PUBLISHED, ConfigFile
from fastface_cli.benchmark.structure import empty_unet, layout_of
from fastface_cli.identity.eva import PREFIX, EvaTower
from fastface_cli.models.tensor_file import Shape, TensorLayout

WIDTH = 2048
"""Width of a token in SDXL's cross-attention."""

CONTROLNET: ConfigFile = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "cross_attention_dim": WIDTH,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}
"""What differs from the defaults of `ControlNetModel`."""


def _linear(name: str, out: int, into: int, *, bias: bool = True) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, into)
    if bias:
        yield f"{name}.bias", (out,)


def _norm(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _perceiver(name: str, width: int, inner: int) -> Iterator[tuple[str, Shape]]:
    """One layer of a resampler: attention and a feed-forward network of four times the width."""
    yield from _norm(f"{name}.0.norm1", width)
    yield from _norm(f"{name}.0.norm2", width)
    yield from _linear(f"{name}.0.to_q", inner, width, bias=False)
    yield from _linear(f"{name}.0.to_kv", 2 * inner, width, bias=False)
    yield from _linear(f"{name}.0.to_out", width, inner, bias=False)
    yield from _norm(f"{name}.1.0", width)
    yield from _linear(f"{name}.1.1", 4 * width, width, bias=False)
    yield from _linear(f"{name}.1.3", width, 4 * width, bias=False)


def _mapping(name: str, into: int, out: int, middle: int = 1024) -> Iterator[tuple[str, Shape]]:
    yield from _linear(f"{name}.0", middle, into)
    yield from _norm(f"{name}.1", middle)
    yield from _linear(f"{name}.3", middle, middle)
    yield from _norm(f"{name}.4", middle)
    yield from _linear(f"{name}.6", out, middle)


def _resampler(features: int) -> Iterator[tuple[str, Shape]]:
    """The projection of a "plus" adapter: four layers, 16 queries of width 1280."""
    yield "latents", (1, 16, 1280)
    yield from _linear("proj_in", 1280, features)
    yield from _linear("proj_out", WIDTH, 1280)
    yield from _norm("norm_out", WIDTH)
    for layer in range(4):
        yield from _perceiver(f"layers.{layer}", 1280, 1280)


def _encoder_v1() -> Iterator[tuple[str, Shape]]:
    yield from _mapping("body", 512 + 768, 5 * WIDTH)
    for level in range(5):
        yield from _mapping(f"mapping_{level}", 1024, WIDTH)
        yield from _mapping(f"mapping_patch_{level}", 1024, WIDTH)


def _encoder_v11() -> Iterator[tuple[str, Shape]]:
    yield "latents", (1, 32, 1024)
    yield "proj_out", (1024, WIDTH)
    for layer in range(10):
        yield from _perceiver(f"layers.{layer}", 1024, 1024)
    for level in range(5):
        yield from _mapping(f"mapping_{level}", 1024, 1024)
    yield from _mapping("id_embedding_mapping", 512 + 768, 5 * 1024)


def _cross_attention(key: str, value: str) -> Iterator[tuple[str, Shape]]:
    """Keys and values of the identity, numbered by the order of the UNet's attention processors."""
    unet = empty_unet(PUBLISHED.unet)
    for index, name in enumerate(unet.attn_processors):
        layer = unet.get_submodule(name.removesuffix(".processor"))
        if layer.is_cross_attention:
            for kind in (key, value):
                yield f"{index}.{kind}.weight", (layer.inner_dim, WIDTH)


def _layout(
    parts: dict[str, Iterator[tuple[str, Shape]]], dtype: torch.dtype, *, pt: bool = False
) -> TensorLayout:
    tensors = {f"{part}.{name}": (shape, dtype) for part, specs in parts.items() for name, shape in specs}
    return TensorLayout(tensors, PT if pt else None)


def plus_face_layout() -> TensorLayout:
    """ip-adapter-plus-face_sdxl_vit-h.safetensors: 191 tensors in float16."""
    keys = _cross_attention("to_k_ip", "to_v_ip")
    return _layout({"image_proj": _resampler(1280), "ip_adapter": keys}, torch.float16)


def instantid_layout() -> TensorLayout:
    """The tensors of InstantID's ip-adapter.bin: 191 in float32."""
    keys = _cross_attention("to_k_ip", "to_v_ip")
    return _layout({"image_proj": _resampler(512), "ip_adapter": keys}, torch.float32)


def pulid_v1_layout() -> TensorLayout:
    """pulid_v1.safetensors: 250 tensors in float32."""
    keys = _cross_attention("id_to_k", "id_to_v")
    parts = {"id_adapter": _encoder_v1(), "id_adapter_attn_layers": keys}
    return _layout(parts, torch.float32, pt=True)


def pulid_v11_layout() -> TensorLayout:
    """pulid_v1.1.safetensors: 312 tensors in float16."""
    keys = _cross_attention("id_to_k", "id_to_v")
    return _layout({"id_adapter": _encoder_v11(), "id_adapter_attn_layers": keys}, torch.float16)


def controlnet_layout() -> TensorLayout:
    """diffusion_pytorch_model.safetensors of InstantID's ControlNet, in float16."""
    from diffusers import ControlNetModel

    with torch.device("meta"):
        return layout_of(ControlNetModel.from_config(CONTROLNET), torch.float16, PT)


def eva_layout() -> TensorLayout:
    """The image tower in open_clip_model.safetensors of EVA02-CLIP: 512 tensors in float16."""
    with torch.device("meta"):
        layout = layout_of(EvaTower(), torch.float16, None)
    return TensorLayout({f"{PREFIX}{name}": spec for name, spec in layout.tensors.items()})
