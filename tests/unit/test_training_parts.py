"""Pure functions of the training code; ``make pocket-report`` measures the trained weights."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training import adapter, captions, common, data, decoder, low_rank, points, styles, tokenizer, unet, vae
from training.ddim import GUIDANCE, TIMESTEPS, Ddim, GuidedDenoiser
from training.export import TARGET
from training.lora import kohya_name


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)


@pytest.fixture
def fact() -> captions.Facts:
    return captions.Facts("female", "young", "asian", True, False, "black", "long", "grey")


@pytest.mark.parametrize("name", list(styles.STYLES))
def test_styles_keep_the_shape_and_change_the_image(name: str, image: np.ndarray) -> None:
    operation, descriptions = styles.STYLES[name]
    styled = operation(image)
    assert styled.shape == image.shape
    assert styled.dtype == np.uint8
    assert (styled != image).any()
    assert len(descriptions) >= 3


def test_caption_starts_with_the_style(fact: captions.Facts) -> None:
    generator = random.Random(1)
    for name, (_, descriptions) in styles.STYLES.items():
        before, _, after = captions.caption(fact, name, generator).partition("; ")
        assert before in descriptions
        assert after


@pytest.mark.parametrize("smile", [True, False])
def test_caption_includes_the_expression_if_required(fact: captions.Facts, smile: bool) -> None:
    generator = random.Random(2)
    words = captions.SMILING if smile else captions.SERIOUS
    for _ in range(50):
        text = captions.caption(replace(fact, smile=smile), "comic", generator, 1.0)
        assert any(word in text for word in words), text


@dataclass
class Faces:
    """Key points of two portraits, the second further to the left."""

    size: int = 128
    key_points: np.ndarray = field(
        default_factory=lambda: (
            np.array([[[96, 112], [160, 112], [128, 144], [104, 176], [152, 176]]] * 2, np.float32)
            - np.array([[[0, 0]], [[32, 0]]], np.float32)
        )
    )


def test_mouth_has_the_largest_weight_and_its_mask_is_mirrored_with_the_image() -> None:
    faces: Any = Faces()
    weights, mouths = unet.position_weights(faces), unet.mouths(faces, 0.75, 0.5)
    assert weights.shape == mouths.shape == (2, 2, 16, 16)
    torch.testing.assert_close(weights.mean((2, 3)), torch.ones(2, 2))
    assert weights[0, 0, 11, 8] == weights[0, 0].max()
    assert weights[0, 0, 11, 8] / weights[0, 0, 0, 0] == pytest.approx(8)
    assert torch.equal(mouths[0, 0], mouths[0, 1])  # a face in the middle is its own mirror image
    assert torch.equal(mouths[1, 0, :, :14], mouths[0, 0, :, 2:])
    assert torch.equal(mouths[1, 1], mouths[1, 0].flip(1))


def test_the_first_timesteps_of_a_batch_are_noisy() -> None:
    torch.manual_seed(0)
    sample = torch.stack([unet.timesteps(32, "cpu") for _ in range(200)])
    assert sample.dtype == torch.int64
    assert 449 <= sample[:, : unet.DECODED_COUNT].min() < 470
    assert sample[:, : unet.DECODED_COUNT].max() == 999
    rest = sample[:, unet.DECODED_COUNT :]
    assert (rest.min(), rest.max()) == (0, 999)
    assert rest.float().mean().item() == pytest.approx(500, abs=15)


def test_tokenizer_encodes_any_text_and_ends_with_the_highest_id(fact: captions.Facts) -> None:
    words = tokenizer.build([fact], seed=0)
    ids = words("A Zebra, éé 北!").input_ids
    assert ids[0] == len(words) - 2
    assert ids[-1] == len(words) - 1 == max(ids)
    assert len(words("woman").input_ids) == 3


def test_alignment_equals_insightface() -> None:
    face_align = pytest.importorskip("insightface.utils.face_align")
    generator = np.random.default_rng(3)
    points = (data.ALIGNED * 1.7 + generator.normal(0, 4, (5, 2)) + 30).astype(np.float32)
    np.testing.assert_allclose(data.alignment(points), face_align.estimate_norm(points), atol=1e-3)


def test_mirrored_key_points_swap_left_and_true_weights() -> None:
    points = np.array([[20, 30], [60, 31], [40, 50], [25, 70], [57, 72]])
    assert data.mirrored(points, 100)[0].tolist() == [79, 30]
    assert data.mirrored_points(points, 100).tolist() == [[39, 31], [79, 30], [59, 50], [42, 72], [74, 70]]


def test_held_out_portraits_are_two_hundred() -> None:
    assert sum(data.is_held_out(index) for index in range(3780)) == 200


def test_low_rank_starts_at_zero_and_can_be_disabled() -> None:
    model = torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 4), "conv1": torch.nn.Conv2d(4, 4, 3, padding=1)})
    x = torch.randn(2, 4)
    before = model["to_q"](x)
    wrapped = low_rank.inject(model, ("to_q", "conv1"), 2)
    assert set(wrapped) == {"to_q", "conv1"}
    assert torch.equal(model["to_q"](x), before)
    assert isinstance(wrapped["to_q"].up.weight, torch.Tensor)
    wrapped["to_q"].up.weight.data.fill_(1)
    assert not torch.equal(model["to_q"](x), before)
    low_rank.enable(wrapped, False)
    assert torch.equal(model["to_q"](x), before)


def test_ddim_equals_the_scheduler_of_the_product() -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == list(TIMESTEPS[:-1])
    x, noise, ddim = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2), Ddim()
    for start, end in pairwise(TIMESTEPS):
        expected = scheduler.step(noise, start, x, return_dict=False)[0]
        torch.testing.assert_close(ddim.step(x, noise, start, end), expected)


@dataclass
class Named:
    """Output of a model."""

    sample: torch.Tensor


def test_denoiser_uses_the_identity_with_and_without_text() -> None:
    def model(x: torch.Tensor, at: torch.Tensor, context: Any, added_cond_kwargs: Any) -> Named:
        texts, (people,) = context
        assert added_cond_kwargs["time_ids"].shape == (4, 6)
        condition = texts.sum((1, 2)) + added_cond_kwargs["text_embeds"].sum(1) + 100 * people.sum((1, 2, 3))
        return Named(x + condition[:, None, None, None] + at[:, None, None, None])

    states, people = torch.ones(2, 77, 8), torch.tensor([1.0, 2.0]).reshape(2, 1, 1).repeat(1, 4, 8)
    added = {"text_embeds": torch.ones(2, 4), "time_ids": torch.ones(2, 6)}
    denoiser = GuidedDenoiser(model, states, added, people)
    unconditional, conditional = denoiser(torch.zeros(2, 4, 1, 1), 7)
    assert unconditional[:, 0, 0, 0].tolist() == [3207, 6407]
    assert (conditional - unconditional).flatten().tolist() == [77 * 8 + 4] * 8
    assert torch.equal(
        denoiser.guided(torch.zeros(2, 4, 1, 1), 7), unconditional + GUIDANCE * (conditional - unconditional)
    )


@pytest.mark.parametrize("step_count", [0, 1, 3])
def test_adapter_sample_starts_from_pure_noise(step_count: int) -> None:
    def model(x: torch.Tensor, at: torch.Tensor, context: Any, added_cond_kwargs: Any) -> Named:
        return Named(0.3 * x + context[0].sum((1, 2))[:, None, None, None] / 1000)

    states, people = torch.ones(2, 77, 8), torch.zeros(2, 4, 8)
    denoiser = GuidedDenoiser(
        model, states, {"text_embeds": torch.ones(2, 4), "time_ids": torch.ones(2, 6)}, people
    )
    ddim, noise = Ddim(), torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    latents, unconditional = adapter.sample(denoiser, ddim, noise, step_count)
    x = noise
    for start, end in list(pairwise(TIMESTEPS))[:step_count]:
        x = ddim.step(x, 0.3 * x + GUIDANCE * 0.616, start, end)
    torch.testing.assert_close(latents, x)
    torch.testing.assert_close(unconditional, 0.3 * x)


def test_loosened_crops_shift_slightly_and_are_mirrored_half_of_the_time() -> None:
    torch.manual_seed(0)
    straight = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(400, 2, 3)
    loosened = vae.loosened(straight)
    assert 0.4 < (loosened[:, 0, 0] < 0).float().mean() < 0.6
    assert (loosened[:, 0, 0].abs() - 1).abs().mean() < 0.06
    assert loosened[:, :, 2].abs().mean() < 0.04


def test_refitted_points_ignore_outliers() -> None:
    generator = np.random.default_rng(0)
    true_weights = generator.normal(size=(10, 49))
    features = np.concatenate([generator.normal(size=(600, 48)), np.ones((600, 1))], axis=1)
    targets = features @ true_weights.T
    targets[::10] += 5.0
    samples = points.Samples(list(features), list(targets), [1.0] * 600)
    new = points.fitted(samples, true_weights + generator.normal(0, 0.2, true_weights.shape))
    assert np.abs(new - true_weights).mean() < 0.02


def test_point_layers_of_the_shipped_detector_can_be_overwritten(tmp_path: Path) -> None:
    shipped, copy = TARGET / "face" / "det_pocket.onnx", tmp_path / "det.onnx"
    copy.write_bytes(shipped.read_bytes())
    heads = points.Heads(copy)
    table = [heads.weights(level) for level in range(3)]
    scene = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert [f.shape for f in heads.features(scene)] == [(8, 8, 49), (4, 4, 49), (2, 2, 49)]
    heads.write(table)
    assert all(np.array_equal(points.Heads(copy).weights(k), table[k]) for k in range(3))
    table[2][10:] += 1
    heads.write(table)
    assert np.allclose(points.Heads(copy).weights(2)[10:], table[2][10:], atol=2e-3)


def test_kohya_names_equal_the_published_ones() -> None:
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert kohya_name(name) == "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"


def test_folding_whitens_latents_and_keeps_images() -> None:
    torch.manual_seed(0)
    model = vae.build(32).eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = model.encode(images).latent_dist.mean
        decoded = model.decode(latents).sample
        mean, std = torch.tensor([0.3, -0.2, 0.1, 0.0]), torch.tensor([2.0, 0.5, 1.5, 1.0])
        decoder.fold(model, mean, std)
        white = model.encode(images).latent_dist.mean
        torch.testing.assert_close(white, (latents - mean[:, None, None]) / std[:, None, None])
        torch.testing.assert_close(model.decode(white).sample, decoded, atol=1e-4, rtol=1e-3)


def test_run_resumes_after_kill(tmp_path: Path) -> None:
    def run(minutes: float) -> common.Run:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        parts = {"model": model, "ema": common.Ema(model), "optimizer": optimizer}
        return common.Run(tmp_path / "stage.pt", minutes, parts)

    first = run(1)
    for step in first.steps():
        if step == 4:
            first.stopped = True
    again = run(1)
    assert again.step == 5
    assert again.seconds == pytest.approx(first.seconds)


def test_the_pocket_lists_the_words_of_its_captions():
    from fastface_cli import pocket
    from training.captions import vocabulary

    assert frozenset(vocabulary()) == pocket.known_words()


def test_words_that_no_caption_has_are_ignored():
    from fastface_cli import pocket

    assert pocket.ignored_words("A photo of a smiling woman, white background") == []
    assert pocket.ignored_words("an Astronaut on the moon; an astronaut") == ["astronaut", "moon"]
