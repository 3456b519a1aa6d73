"""Levels of saving memory give the same pictures, and leave on the device what they say."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from support.methods import FASTFACE, METHODS, assert_same, latents, requests
from support.pretend_device import pretended

from benchmarks.footprint import count
from fastface_cli.app.pipeline import Pipeline
from fastface_cli.errors import DeviceError, UsageError
from fastface_cli.models.acceleration import Acceleration
from fastface_cli.models.device import memory_errors
from fastface_cli.models.offload import (
    DECODING,
    GIB,
    HEADROOM,
    LEVELS,
    OFF,
    PEAKS,
    blocks_of,
    choose,
    next_smaller,
    visiting,
)
from fastface_cli.recipe.files import load_recipe

CPU = torch.device("cpu")
LIMITS = {"am1": 1e-5, "fastface": 1e-5, "am2": 2e-4, "fastface-am2": 2e-4}
"""Golden tolerances."""


@pytest.fixture(scope="module")
def parts(miniature):
    return {role: miniature[role] for role in ("base", "adapter", "image_encoder")}


@pytest.mark.parametrize(
    ("level", "method"), [("12", "fastface"), ("8", "am1"), ("6", "fastface"), ("6", "fastface-am2")]
)
def test_offload_level_gives_the_same_image_on_a_device(level, method, parts, person):
    """With a pretended card, which refuses an operation on tensors of two places."""
    plain = Pipeline.load(METHODS[method], parts, device="cpu", dtype="float32")
    expected = latents(plain, requests(person))
    with pretended("cuda:0") as card:
        saving = on_card(METHODS[method], parts, level, card.device)
        at_home = homes(saving)
        actual = latents(saving, requests(person))
        assert homes(saving) == at_home, "everything is back where it lives"
    assert_same(actual, expected, LIMITS[method])


def on_card(recipe, parts, level: str, card: torch.device) -> Pipeline:
    """A pipeline that runs on a card that is only pretended: no loader would put anything there."""
    pipeline = Pipeline.load(recipe, parts, device="cpu", dtype="float32", level=LEVELS[level])
    pipeline.backbone.device = card
    if not LEVELS[level].models:
        pipeline.unet.to(card)
        pipeline.vae.to(card)
    return pipeline


def homes(pipeline: Pipeline) -> list[int]:
    """Which tensor every parameter is."""
    modules = (pipeline.unet, pipeline.vae, pipeline.parts.text_encoder, pipeline.parts.image_encoder)
    return [id(parameter) for module in modules for parameter in module.parameters()]


def test_off_moves_nothing(parts, person):
    pipeline = Pipeline.load(FASTFACE, parts, device="cpu", dtype="float32")
    assert pipeline.level is OFF
    assert not pipeline.key_modules


def on_device(pipeline: Pipeline) -> set[str]:
    """The parts that lie on the device now, whole or in part; weights of keys and values by themselves."""
    actual = set()
    named = {"unet": pipeline.unet, "vae": pipeline.vae, "projection": pipeline.projection}
    for name in ("text_encoder", "text_encoder_2", "image_encoder"):
        named[name] = getattr(pipeline.parts, name)
    for name, module in named.items():
        for part in module.modules():
            if any(tensor.device.type == "cuda" for tensor in part.parameters(recurse=False)):
                actual.add("keys" if part in pipeline.key_modules else name)
    return actual


STAGES = {
    "12": {
        "text": {"unet", "vae", "text_encoder", "text_encoder_2"},
        "step": {"unet", "vae"},
        "vae": {"unet", "vae"},
    },
    "8": {"text": {"text_encoder", "text_encoder_2"}, "step": {"unet"}, "vae": {"vae"}},
    "6": {"text": {"text_encoder", "text_encoder_2"}, "step": {"unet"}, "vae": {"vae"}},
}


@pytest.mark.parametrize("level", STAGES)
def test_what_is_on_the_device_while_it_works(level, parts, person, monkeypatch):
    with pretended("cuda:0") as card:
        pipeline = on_card(FASTFACE, parts, level, card.device)
        seen: dict[str, set[str]] = {"text": set(), "step": set(), "vae": set()}

        def spy(module: torch.nn.Module, stage: str) -> None:
            module.register_forward_pre_hook(lambda *_: seen[stage].update(on_device(pipeline)))

        spy(pipeline.parts.text_encoder_2, "text")
        spy(pipeline.layers[0][1].to_out[0], "step")
        spy(pipeline.vae.decoder, "vae")
        latents(pipeline, requests(person))
        assert on_device(pipeline) == ({"unet", "vae"} if level == "12" else set())
    assert seen == STAGES[level]


def test_in_blocks_one_block_at_a_time(parts, person):
    with pretended("cuda:0") as card:
        pipeline = on_card(FASTFACE, parts, "6", card.device)
        blocks, most = blocks_of(pipeline.unet), [0]

        def count(*_: object) -> None:
            here = [any(p.device.type == "cuda" for p in block.parameters()) for block in blocks]
            most[0] = max(most[0], sum(here))

        for block in blocks:
            block.register_forward_hook(count)
        latents(pipeline, requests(person))
    assert most[0] == 1
    own = {id(p) for block in blocks for p in block.parameters()}
    assert own == {id(p) for p in pipeline.unet.parameters()}, "the blocks hold every weight"


def test_branches_go_one_by_one_where_they_do_not_see_each_other(parts, person):
    def sizes(method: str, level: str) -> Sequence[int]:
        pipeline = Pipeline.load(METHODS[method], parts, device="cpu", dtype="float32", level=LEVELS[level])
        seen: list[int] = []
        pipeline.unet.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        next(pipeline.generate(requests(person)[:1]))
        return seen

    assert sizes("fastface", "12") == sizes("fastface", "6") == [2, 3, 3, 2]
    assert sizes("fastface", "8") == [1] * 10
    assert sizes("fastface-am2", "8") == [3, 3, 3, 3], "joint normalisation looks at all branches"


@pytest.mark.parametrize("name", LEVELS)
def test_the_peaks_are_those_of_the_published_size(name):
    """Counted on tensors without numbers; each level leaves a quarter of its card for what is no tensor."""
    actual = count(load_recipe("hyper-fastface").recipe, LEVELS[name]).peak / GIB
    assert actual == pytest.approx(PEAKS[name], abs=0.05)
    if name != "off":
        assert actual + HEADROOM < 0.95 * int(name)


def test_memory_of_larger_images_matches_the_documentation():
    recipe = load_recipe("hyper-fastface", overrides=["sampling.width=1536", "sampling.height=1536"]).recipe
    for name in ("off", "12"):
        actual = count(recipe, LEVELS[name]).peak / GIB
        assert actual == pytest.approx(PEAKS[name] + DECODING * 1.25, abs=0.1)


@pytest.mark.parametrize(
    ("free", "level"), [(24, "off"), (12, "off"), (11, "12"), (8, "8"), (6, "8"), (5, "6"), (2, "6")]
)
def test_the_fastest_level_that_fits_is_chosen(free, level):
    assert choose(free * GIB, 1024**2).name == level


def test_more_pixels_and_wider_numbers_need_more():
    assert choose(12 * GIB, 2 * 1024**2).name == "12"
    assert choose(24 * GIB, 1024**2, half=False).name == "off"
    assert choose(20 * GIB, 1024**2, half=False).name == "12"


def test_a_visit_ends_when_the_work_fails():
    layer = torch.nn.Linear(2, 2)
    with pretended("cuda:0") as card:
        with pytest.raises(ZeroDivisionError), visiting(card.device, layer):
            1 // int(layer.weight.device != card.device)  # it fails, and only while the layer is there
        assert layer.weight.device == CPU


@pytest.mark.parametrize(
    ("level", "items", "message"),
    [
        ("8", {"compile": True}, "use --low-memory 12"),
        ("6", {"cache_kv": False}, "cache_kv=off"),
        ("8", {"fuse_lora": False}, "fuse_lora=off"),
    ],
)
def test_what_excludes_a_level_is_refused_before_anything_is_loaded(level, items, message):
    with pytest.raises(UsageError) as error:
        Pipeline.load(FASTFACE, {}, device="cpu", acceleration=Acceleration(**items), level=LEVELS[level])
    assert message in f"{error.value} {error.value.hint}"


@pytest.mark.parametrize(("level", "named"), [("off", "12"), ("12", "8"), ("8", "6")])
def test_out_of_memory_names_the_level_to_try(level, named):
    device = torch.device("cuda")
    with pytest.raises(DeviceError) as error, memory_errors(device, LEVELS[level]):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert f"--low-memory {named}" in error.value.hint
    assert error.value.exit_code == 4


def test_after_the_smallest_level_there_is_none():
    assert next_smaller(LEVELS["6"]) is None
    with pytest.raises(DeviceError) as error, memory_errors(torch.device("cuda"), LEVELS["6"]):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "--low-memory" not in error.value.hint
    assert "--size" in error.value.hint
