"""Every item that makes pictures faster gives what the plain way gives."""

from __future__ import annotations

import pytest
import torch
from support.methods import FASTFACE, assert_same, latents, requests

from fastface_cli.app.pipeline import Pipeline
from fastface_cli.errors import DeviceError, UsageError
from fastface_cli.models.acceleration import Acceleration, _is_large, arrange


@pytest.fixture(scope="module")
def parts(miniature):
    return {role: miniature[role] for role in ("base", "adapter", "image_encoder")}


@pytest.fixture(scope="module")
def plain(parts):
    return Pipeline.load(FASTFACE, parts, device="cpu", dtype="float32", acceleration=Acceleration.none())


@pytest.mark.parametrize("item", ["fuse_lora", "prune", "cache_kv"])
def test_an_exact_item_changes_nothing(item, parts, plain, person):
    faster = Acceleration(**{**Acceleration.none().describe(), item: True})
    pipeline = Pipeline.load(FASTFACE, parts, device="cpu", dtype="float32", acceleration=faster)
    assert_same(latents(pipeline, requests(person)), latents(plain, requests(person)), 1e-5)


def test_an_unfused_lora_stays_beside_the_weights(parts, plain):
    assert any("lora_A" in name for name, _ in plain.unet.named_parameters())
    fused = Pipeline.load(FASTFACE, parts, device="cpu", dtype="float32")
    assert not any("lora" in name for name, _ in fused.unet.named_parameters())


def test_an_unpruned_plan_computes_every_branch(plain):
    assert [len(step.branches) for step in plain.plan()] == [3, 3, 3, 3]
    assert [len(step.branches) for step in plain.plan(prune=True)] == [2, 3, 3, 2]


def test_keys_and_values_are_projected_once_per_image(parts, person, plain):
    cached = Pipeline.load(FASTFACE, parts, device="cpu", dtype="float32")
    for pipeline, times in ((cached, 1), (plain, 4)):
        _, layer = pipeline.layers[0]
        calls = []
        hook = layer.to_k.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        try:
            next(pipeline.generate(requests(person)[:1]))
        finally:
            hook.remove()
        assert len(calls) == times


def test_memory_layout_changes_nothing_beyond_rounding(parts, plain, person):
    faster = Acceleration(channels_last=True)
    pipeline = Pipeline.load(FASTFACE, parts, device="cpu", dtype="float32", acceleration=faster)
    assert pipeline.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert_same(latents(pipeline, requests(person)), latents(plain, requests(person)), 1e-5)


def test_fused_self_attention_changes_nothing_beyond_rounding(parts, plain, person):
    faster = Acceleration(fuse_qkv=True)
    pipeline = Pipeline.load(FASTFACE, parts, device="cpu", dtype="float32", acceleration=faster)
    layer = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    assert layer.to_qkv.out_features == 3 * layer.to_out[0].in_features
    assert layer.to_q is None, "the single projections are freed"
    assert_same(latents(pipeline, requests(person)), latents(plain, requests(person)), 1e-5)


def test_self_attention_is_not_fused_around_an_unfused_lora(parts):
    both = Acceleration(fuse_qkv=True, fuse_lora=False)
    with pytest.raises(UsageError, match="fuse_qkv=on needs fuse_lora=on"):
        Pipeline.load(FASTFACE, parts, device="cpu", acceleration=both)


def test_the_vae_has_its_own_precision(parts, person):
    numbers = {}
    for vae in ("auto", "half", "float32"):
        faster = Acceleration(vae=vae)
        pipeline = Pipeline.load(FASTFACE, parts, device="cpu", dtype="bfloat16", acceleration=faster)
        numbers[vae] = pipeline.vae.dtype
    assert numbers == {"auto": torch.bfloat16, "half": torch.bfloat16, "float32": torch.float32}
    overflowing = Pipeline.load(FASTFACE, parts, device="cpu", dtype="float16").vae
    assert overflowing.dtype is torch.float32
    arrange(torch.nn.Linear(1, 1), overflowing, Acceleration(vae="half"))
    assert overflowing.dtype is torch.bfloat16


def test_fp8_is_refused_before_anything_is_loaded(parts):
    with pytest.raises(DeviceError, match="8-bit"):
        Pipeline.load(FASTFACE, {}, device="cpu", acceleration=Acceleration(fp8=True))


def test_only_large_layers_of_every_step_are_multiplied_in_8_bits():
    wide, narrow = torch.nn.Linear(640, 640), torch.nn.Linear(320, 640)
    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    assert _is_large(wide, f"{block}.ff.net.2")
    assert _is_large(wide, f"{block}.attn1.to_k")
    assert not _is_large(wide, f"{block}.attn2.to_k"), "projected once a picture"
    assert not _is_large(narrow, f"{block}.ff.net.2")
    assert not _is_large(wide, "time_embedding.linear_1")
    assert not _is_large(torch.nn.Conv2d(640, 640, 1), f"{block}.ff.net.2")


def test_lossy_items_are_off_by_default_and_say_so():
    assert Acceleration().lossy() == {}
    assert Acceleration(compile=True, channels_last=True, vae="float32").lossy() == {}
    assert Acceleration(fp8=True, vae="half").lossy() == {"fp8": True, "vae": "half"}
