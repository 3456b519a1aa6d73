"""Benchmark calculations: operation counts, order of rounds, percentiles and ratios."""

from __future__ import annotations

import pytest
import torch

from fastface_cli.benchmark import flops, timing
from fastface_cli.benchmark.sdxl import MINIATURE, PUBLISHED


def test_full_size_unet_and_vae_operation_counts():
    assert flops.unet_sample(PUBLISHED.unet, 128, 128) == pytest.approx(6.76e12, rel=1e-3)
    assert flops.vae_decode(PUBLISHED.vae, 128, 128) == pytest.approx(10.47e12, rel=1e-3)


def test_unfused_lora_operation_count():
    more = flops.unet_sample(PUBLISHED.unet, 128, 128, rank=128) - flops.unet_sample(PUBLISHED.unet, 128, 128)
    assert more == pytest.approx(0.33e12, rel=0.02)


def test_encoder_operation_counts():
    from transformers import CLIPTextConfig, CLIPVisionConfig

    assert flops.text_encoder(CLIPTextConfig(**PUBLISHED.text_encoder)) == pytest.approx(0.0134e12, rel=0.05)
    assert flops.text_encoder(CLIPTextConfig(**PUBLISHED.text_encoder_2)) == pytest.approx(0.098e12, rel=0.02)
    assert flops.image_encoder(CLIPVisionConfig(**PUBLISHED.image_encoder)) == pytest.approx(
        0.334e12, rel=0.02
    )


def test_image_encoder_count_equals_pytorch_flop_counter():
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**MINIATURE.image_encoder)
    config._attn_implementation = "eager"  # the counter does not support fused attention on the CPU
    model = CLIPVisionModelWithProjection(config).float().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.rand(1, 3, config.image_size, config.image_size))
    projection = 2 * config.hidden_size * config.projection_dim
    assert flops.image_encoder(config) == counter.get_total_flops() - projection


def test_percentiles_are_interpolated():
    result = timing.spread([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (result.p50, result.n) == (3.0, 5)
    assert result.p90 == pytest.approx(4.6)
    assert result.p99 == pytest.approx(4.96)
    with pytest.raises(ValueError, match="nothing"):
        timing.spread([])


def test_every_second_round_is_reversed():
    assert timing.interleaved(3, 4) == [[0, 1, 2], [2, 1, 0], [0, 1, 2], [2, 1, 0]]


def test_confidence_interval_contains_the_ratio_of_medians():
    fast = [1.0, 1.1, 0.9, 1.0, 5.0]
    result = timing.ratio_of_medians([2 * x for x in fast], fast)
    assert result.value == pytest.approx(2.0)
    assert result.low == pytest.approx(2.0)  # the bootstrap draws the same rounds for both
    assert result.high == pytest.approx(2.0)
    noisy = timing.ratio_of_medians([2.0, 2.2, 1.8, 2.1, 1.9], [1.0, 0.9, 1.1, 1.0, 1.0])
    assert noisy.low < noisy.value < noisy.high
    with pytest.raises(ValueError, match="rounds"):
        timing.ratio_of_medians([1.0], [1.0, 2.0])


def test_stopwatch_returns_stages_in_order_and_resets():
    watch = timing.Stopwatch(torch.device("cpu"))
    with watch("text"):
        torch.ones(10).sum()
    with watch("step"):
        pass
    with watch("step"):
        pass
    spans = watch.read()
    assert [stage for stage, _ in spans] == ["text", "step", "step"]
    assert all(milliseconds >= 0 for _, milliseconds in spans)
    assert watch.read() == []


def recipe(name: str = "pocket-fastface"):
    from fastface_cli.recipe.files import load_recipe

    return load_recipe(name).recipe


def test_stages_are_summed_and_ordered():
    from fastface_cli.benchmark.run import Round, by_stage, ordered

    totals = by_stage(
        [
            ("png", 1.0),
            ("step", 2.0),
            ("step", 3.0),
            ("text", 4.0),
            ("text", 0.5),
            ("keys", 1.5),
            ("face", 6.0),
        ]
    )
    assert totals["text"] == 4.5
    assert ordered(totals) == ["face", "text", "keys", "step 1", "step 2", "png"]
    assert ordered({f"step {i}": 0.0 for i in range(12, 0, -1)})[-1] == "step 12"
    assert (
        Round(20.0, totals, 10, torch.zeros(1)).loop == 6.5
    )  # the steps and the projection of keys and values


def test_side_is_compared_with_the_first_side_of_its_recipe():
    from fastface_cli.benchmark.run import compared
    from fastface_cli.benchmark.sides import Side

    first, other = recipe(), recipe("pocket-am1")
    sides = [Side("a", first), Side("b", first, "reference"), Side("c", other), Side("d", other, "reference")]
    assert compared(sides) == [(1, 0), (2, 0), (3, 2)]


def test_ablation_disables_one_optimization_per_side():
    from fastface_cli.benchmark.sides import ablation
    from fastface_cli.models.acceleration import Acceleration

    sides = ablation(recipe(), Acceleration(channels_last=True))
    assert sides[0].acceleration == Acceleration(channels_last=True)
    assert sides[-1].acceleration == Acceleration.none()
    for side in sides[1:-1]:
        before, after = sides[0].acceleration.describe(), side.acceleration.describe()
        changed = [name for name in before if before[name] != after[name]]
        assert [side.label] == [f"without {name}" for name in changed]
    labels = {side.label for side in sides}
    assert {"without fuse_lora", "without prune", "without cache_kv", "without channels_last"} <= labels
    assert "without fp8" not in labels  # it is disabled in `acceleration`


def test_side_survives_json_round_trip():
    import json

    from fastface_cli.benchmark.sides import Side
    from fastface_cli.models.acceleration import Acceleration

    for name in ("pocket-am2", "hyper-fastface", "base"):
        side = Side("x", recipe(name), "ours", Acceleration(prune=False))
        assert Side.from_json(json.loads(json.dumps(side.to_json()))) == side


def test_invalid_outputs_are_refused(person):
    from PIL import Image

    from fastface_cli.app.pipeline import GeneratedImage, Request
    from fastface_cli.benchmark.run import check
    from fastface_cli.errors import FastFaceError

    def output(noise, latents):
        image = Image.new("RGB", (8, 8))
        return GeneratedImage(image, Request("x", 0, person), 0.8, 4, 0.1, noise, latents, torch.zeros(1))

    ones = torch.ones(1, 4, 2, 2)
    check(output(ones[0], ones))
    with pytest.raises(FastFaceError, match="noise is zero"):
        check(output(0 * ones[0], ones))
    with pytest.raises(FastFaceError, match="not finite"):
        check(output(ones[0], ones / 0))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("hyper-instantid-fastface", []),
        ("lightning-plusface", []),
        ("lightning-pulid-dcg", []),
        ("lightning-pulid", ["adapter.kind=pulid_v1.1"]),
    ],
)
def test_a_benchmark_with_random_weights_runs_with_every_adapter(name, changes):
    from fastface_cli.benchmark.random_stack import random_pipeline
    from fastface_cli.benchmark.run import one_round
    from fastface_cli.recipe.files import load_recipe

    sizes = ["sampling.width=64", "sampling.height=64"]
    small = load_recipe(name, overrides=[*sizes, *changes]).recipe
    pipeline = random_pipeline(small, torch.device("cpu"), torch.float32, stack=MINIATURE)
    result = one_round(pipeline, 1, 1, None)
    assert result.latents.std() > 0.1
    assert pipeline.warm_up() > 0
    alone = load_recipe(name, overrides=[*sizes, *changes, "adapter.scale=0"]).recipe
    without = pipeline.sharing(alone, pipeline.scheduler, pipeline.acceleration)
    assert (one_round(without, 1, 1, None).latents - result.latents).norm() > 0.01


def test_the_published_implementation_has_faceid_alone():
    from fastface_cli.commands.bench import bench
    from fastface_cli.errors import UsageError

    with pytest.raises(UsageError, match="FaceID alone"):
        bench(recipe=["hyper-pulid"], against="reference", weights="random-small", device="cpu")


def test_random_pipeline_and_published_pipeline_have_equal_latents(person):
    from fastface_cli.app.pipeline import Request
    from fastface_cli.benchmark.random_stack import random_pipeline, random_reference
    from fastface_cli.recipe.files import load_recipe

    small = load_recipe("hyper-fastface", overrides=["sampling.width=64", "sampling.height=64"]).recipe
    cpu, number = torch.device("cpu"), torch.float32
    request = [Request("a person", 1, person)]
    ours = next(random_pipeline(small, cpu, number, stack=MINIATURE).generate(request))
    theirs = next(random_reference(small, cpu, number, MINIATURE).generate(request))
    assert (ours.unet_samples, theirs.unet_samples) == (10, 12)
    assert ours.latents.std() > 0.1
    assert float((ours.latents - theirs.latents).norm() / theirs.latents.norm()) < 1e-5
