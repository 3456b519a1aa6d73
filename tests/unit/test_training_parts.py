"""The training code's pure parts; the training itself is measured by ``make pocket-report``."""

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
from training.export import TARGET
from training.lora import kohya_name
from training.walk import GUIDANCE, STATIONS, Guide, Walk


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)


@pytest.fixture
def fact() -> captions.Facts:
    return captions.Facts("female", "young", "asian", True, False, "black", "long", "grey")


@pytest.mark.parametrize("name", list(styles.STYLES))
def test_styles_keep_the_shape_and_change_the_picture(name: str, picture: np.ndarray) -> None:
    operation, descriptions = styles.STYLES[name]
    styled = operation(picture)
    assert styled.shape == picture.shape
    assert styled.dtype == np.uint8
    assert (styled != picture).any()
    assert len(descriptions) >= 3


def test_captions_put_the_style_before_a_semicolon(fact: captions.Facts) -> None:
    generator = random.Random(1)
    for name, (_, descriptions) in styles.STYLES.items():
        before, _, after = captions.caption(fact, name, generator).partition("; ")
        assert before in descriptions
        assert after


@pytest.mark.parametrize("smile", [True, False])
def test_a_caption_that_is_asked_to_names_the_expression(fact: captions.Facts, smile: bool) -> None:
    generator = random.Random(2)
    words = captions.SMILING if smile else captions.SERIOUS
    for _ in range(50):
        text = captions.caption(replace(fact, smile=smile), "comic", generator, 1.0)
        assert any(word in text for word in words), text


@dataclass
class Faces:
    """What of the portraits tells where faces are: two of them, the second further to the left."""

    size: int = 128
    key_points: np.ndarray = field(
        default_factory=lambda: (
            np.array([[[96, 112], [160, 112], [128, 144], [104, 176], [152, 176]]] * 2, np.float32)
            - np.array([[[0, 0]], [[32, 0]]], np.float32)
        )
    )


def test_the_mouth_counts_most_and_its_mask_mirrors_with_the_picture() -> None:
    faces: Any = Faces()
    weights, mouths = unet.place_weights(faces), unet.mouths(faces, 0.75, 0.5)
    assert weights.shape == mouths.shape == (2, 2, 16, 16)
    torch.testing.assert_close(weights.mean((2, 3)), torch.ones(2, 2))
    assert weights[0, 0, 11, 8] == weights[0, 0].max()
    assert weights[0, 0, 11, 8] / weights[0, 0, 0, 0] == pytest.approx(8)
    assert torch.equal(mouths[0, 0], mouths[0, 1])  # a face in the middle is its own mirror image
    assert torch.equal(mouths[1, 0, :, :14], mouths[0, 0, :, 2:])
    assert torch.equal(mouths[1, 1], mouths[1, 0].flip(1))


def test_the_first_timesteps_of_a_batch_are_noisy() -> None:
    torch.manual_seed(0)
    drawn = torch.stack([unet.timesteps(32, "cpu") for _ in range(200)])
    assert drawn.dtype == torch.int64
    assert 449 <= drawn[:, : unet.ASKED].min() < 470
    assert drawn[:, : unet.ASKED].max() == 999
    rest = drawn[:, unet.ASKED :]
    assert (rest.min(), rest.max()) == (0, 999)
    assert rest.float().mean().item() == pytest.approx(500, abs=15)


def test_tokenizer_reads_any_text_and_ends_with_its_highest_id(fact: captions.Facts) -> None:
    words = tokenizer.build([fact], seed=0)
    ids = words("A Zebra, éé 北!").input_ids
    assert ids[0] == len(words) - 2
    assert ids[-1] == len(words) - 1 == max(ids)
    assert len(words("woman").input_ids) == 3


def test_alignment_is_insightfaces() -> None:
    face_align = pytest.importorskip("insightface.utils.face_align")
    generator = np.random.default_rng(3)
    points = (data.ALIGNED * 1.7 + generator.normal(0, 4, (5, 2)) + 30).astype(np.float32)
    np.testing.assert_allclose(data.alignment(points), face_align.estimate_norm(points), atol=1e-3)


def test_a_mirrored_face_has_its_left_eye_where_the_right_one_was() -> None:
    points = np.array([[20, 30], [60, 31], [40, 50], [25, 70], [57, 72]])
    assert data.mirrored(points, 100)[0].tolist() == [79, 30]
    found = data.mirrored_points(points, 100)
    assert found.tolist() == [[39, 31], [79, 30], [59, 50], [42, 72], [74, 70]]


def test_held_out_portraits_are_two_hundred() -> None:
    assert sum(data.is_held_out(index) for index in range(3780)) == 200


def test_low_rank_starts_as_nothing_and_can_be_switched_off() -> None:
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


def test_walk_is_the_products_scheduler() -> None:
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
    assert scheduler.timesteps.tolist() == list(STATIONS[:-1])
    x, noise, walk = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2), Walk()
    for start, end in pairwise(STATIONS):
        expected = scheduler.step(noise, start, x, return_dict=False)[0]
        torch.testing.assert_close(walk.step(x, noise, start, end), expected)


@dataclass
class Named:
    """A model's output."""

    sample: torch.Tensor


def test_a_guide_asks_once_with_the_texts_and_once_without_but_always_with_the_people() -> None:
    def model(x: torch.Tensor, at: torch.Tensor, context: Any, added_cond_kwargs: Any) -> Named:
        texts, (people,) = context
        assert added_cond_kwargs["time_ids"].shape == (4, 6)
        told = texts.sum((1, 2)) + added_cond_kwargs["text_embeds"].sum(1) + 100 * people.sum((1, 2, 3))
        return Named(x + told[:, None, None, None] + at[:, None, None, None])

    states, people = torch.ones(2, 77, 8), torch.tensor([1.0, 2.0]).reshape(2, 1, 1).repeat(1, 4, 8)
    added = {"text_embeds": torch.ones(2, 4), "time_ids": torch.ones(2, 6)}
    guide = Guide(model, states, added, people)
    blind, seeing = guide(torch.zeros(2, 4, 1, 1), 7)
    assert blind[:, 0, 0, 0].tolist() == [3207, 6407]
    assert (seeing - blind).flatten().tolist() == [77 * 8 + 4] * 8
    assert torch.equal(guide.guided(torch.zeros(2, 4, 1, 1), 7), blind + GUIDANCE * (seeing - blind))


@pytest.mark.parametrize("legs", [0, 1, 3])
def test_what_the_adapter_is_judged_on_was_drawn_from_the_noise_alone(legs: int) -> None:
    def model(x: torch.Tensor, at: torch.Tensor, context: Any, added_cond_kwargs: Any) -> Named:
        return Named(0.3 * x + context[0].sum((1, 2))[:, None, None, None] / 1000)

    states, people = torch.ones(2, 77, 8), torch.zeros(2, 4, 8)
    guide = Guide(model, states, {"text_embeds": torch.ones(2, 4), "time_ids": torch.ones(2, 6)}, people)
    walk, noise = Walk(), torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    found, blind = adapter.drawn(guide, walk, noise, legs)
    x = noise
    for start, end in list(pairwise(STATIONS))[:legs]:
        x = walk.step(x, 0.3 * x + GUIDANCE * 0.616, start, end)
    torch.testing.assert_close(found, x)
    torch.testing.assert_close(blind, 0.3 * x)


def test_loosened_crops_move_little_and_are_mirrored_half_of_the_time() -> None:
    torch.manual_seed(0)
    straight = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(400, 2, 3)
    found = vae.loosened(straight)
    assert 0.4 < (found[:, 0, 0] < 0).float().mean() < 0.6
    assert (found[:, 0, 0].abs() - 1).abs().mean() < 0.06
    assert found[:, :, 2].abs().mean() < 0.04


def test_refitted_points_follow_most_faces_and_not_the_covered_ones() -> None:
    generator = np.random.default_rng(0)
    right = generator.normal(size=(10, 49))
    features = np.concatenate([generator.normal(size=(600, 48)), np.ones((600, 1))], axis=1)
    wanted = features @ right.T
    wanted[::10] += 5.0
    samples = points.Samples(list(features), list(wanted), [1.0] * 600)
    new = points.fitted(samples, right + generator.normal(0, 0.2, right.shape))
    assert np.abs(new - right).mean() < 0.02


def test_the_points_layers_of_the_shipped_detector_can_be_rewritten(tmp_path: Path) -> None:
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


def test_kohya_names_are_the_published_ones() -> None:
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert kohya_name(name) == "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"


def test_folding_whitens_latents_and_changes_no_picture() -> None:
    torch.manual_seed(0)
    model = vae.build(32).eval()
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = model.encode(pictures).latent_dist.mean
        decoded = model.decode(latents).sample
        mean, std = torch.tensor([0.3, -0.2, 0.1, 0.0]), torch.tensor([2.0, 0.5, 1.5, 1.0])
        decoder.fold(model, mean, std)
        white = model.encode(pictures).latent_dist.mean
        torch.testing.assert_close(white, (latents - mean[:, None, None]) / std[:, None, None])
        torch.testing.assert_close(model.decode(white).sample, decoded, atol=1e-4, rtol=1e-3)


def test_a_run_resumes_where_it_was_killed(tmp_path: Path) -> None:
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
