"""One step of the further adapters at their published size, on meta tensors: shapes, types and devices."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks import adapter_files
from fastface_cli.adapters.base import DecoupledAdapter
from fastface_cli.adapters.instantid import InstantID
from fastface_cli.adapters.plus_face import PlusFace
from fastface_cli.adapters.plus_projection import empty_plus
from fastface_cli.adapters.pulid import ENCODER, Pulid, empty_pulid
from fastface_cli.benchmark.sdxl import PUBLISHED
from fastface_cli.identity.identity import Identity
from fastface_cli.models.tensor_file import TensorLayout
from fastface_cli.sampling import processor
from fastface_cli.sampling.guidance import BRANCHES

META, HALF = torch.device("meta"), torch.float16


def state_of(layout: TensorLayout, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a part of a published file, without numbers, under the names of diffusers."""
    return {
        name.removeprefix(prefix): torch.empty(shape, dtype=HALF, device=META)
        for name, (shape, _) in layout.tensors.items()
        if name.startswith(prefix)
    }


def resampler(features: int) -> torch.nn.Module:
    """The projection of a "plus" adapter at its published size."""
    specs = {
        "proj_in.weight": (1280, features),
        "proj_out.weight": (2048, 1280),
        "latents": (1, 16, 1280),
        "layers.0.attn.to_q.weight": (1280, 1280),
        "layers.3.attn.to_q.weight": (1280, 1280),
    }
    return empty_plus({name: torch.empty(shape, device=META) for name, shape in specs.items()}).half()


def instantid() -> DecoupledAdapter:
    with META:
        controlnet = ControlNetModel.from_config(adapter_files.CONTROLNET).half().eval()
    return InstantID(resampler(512), controlnet)


def pulid(layout: TensorLayout, zero_tokens: int) -> DecoupledAdapter:
    encoder = empty_pulid(state_of(layout, ENCODER)).half()
    return replace(Pulid(encoder), zero_tokens=zero_tokens, orthogonal="ortho_v2")


def plus_face() -> DecoupledAdapter:
    with META:
        encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**PUBLISHED.image_encoder)).half().eval()
    return PlusFace(encoder, resampler(1280))


ADAPTERS = {
    "plus_face": (plus_face, 16),
    "instantid": (instantid, 16),
    "pulid_v1": (lambda: pulid(adapter_files.pulid_v1_layout(), 8), 10),
    "pulid_v1.1": (lambda: pulid(adapter_files.pulid_v11_layout(), 20), 32),
}


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    with META:
        model = UNet2DConditionModel.from_config(PUBLISHED.unet).half().eval().requires_grad_(False)
        own = {}
        for name, loaded in model.attn_processors.items():
            layer = model.get_submodule(name.removesuffix(".processor"))
            cross = IPAdapterAttnProcessor2_0(layer.to_q.out_features, 2048, num_tokens=(4,))
            own[name] = cross.half() if layer.is_cross_attention else loaded
        model.set_attn_processor(own)
    return model


def somebody(person: Identity) -> Identity:
    """An identity with everything that the adapters read, at the published size."""
    rng = np.random.default_rng(0)
    features = {
        "embedding_norm": np.array([20.0], np.float32),
        "key_points": rng.uniform(100, 300, (1, 5, 2)).astype(np.float32),
        "photo_size": np.array([[400, 500]], np.float32),
        "eva_embedding": rng.standard_normal((1, 768)).astype(np.float32),
        "eva_hidden": rng.standard_normal((1, 5, 577, 1024)).astype(np.float32),
    }
    return replace(person, features=features)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_one_step_of_two_images_at_1024(kind: str, unet: UNet2DConditionModel, person: Identity) -> None:
    make, count = ADAPTERS[kind]
    adapter, images, branches = make(), 2, 3
    with torch.no_grad():
        absent, tokens = adapter.tokens(somebody(person), lambda *_: nullcontext())
    assert (tokens.shape, tokens.dtype, tokens.device.type) == ((count, 2048), HALF, "meta")
    assert absent.shape == tokens.shape
    assert adapter.num_tokens == count
    layers, processors = adapter.attention(unet)
    assert len(layers) == 70
    text = torch.empty(2 * images, 77, 2048, dtype=HALF, device=META)
    identity = torch.stack([absent] * images + [tokens] * images)
    conditions = processor.Conditions(
        text=text,
        pooled=torch.empty(2 * images, 1280, dtype=HALF, device=META),
        time_ids=torch.empty(1, 6, dtype=HALF, device=META),
        identity=identity,
        scale=torch.empty(4, images, device=META),
        has_identity=[True] * 4,
        images=images,
        projected=processor.project(layers, processors, text, identity),
        extra=adapter.extra_conditioning([somebody(person)] * images, (1024, 1024), lambda *_: nullcontext()),
    )
    rows = conditions.select(BRANCHES["identity_first"], dict.fromkeys(("down", "mid", "up")), 0)
    latents = torch.empty(branches * images, 4, 128, 128, dtype=HALF, device=META)
    with torch.no_grad(), processor.installed(layers, processors):
        extra = {} if rows.extra is None else rows.extra(latents, torch.tensor(999.0), rows)
        (predicted,) = unet(
            latents,
            torch.tensor(999),
            encoder_hidden_states=rows,
            added_cond_kwargs={"text_embeds": rows.pooled, "time_ids": rows.time_ids},
            return_dict=False,
            **extra,
        )
    assert bool(extra) == (kind == "instantid")
    assert (predicted.shape, predicted.dtype) == (latents.shape, HALF)
