"""The sampling loop on a random miniature: against a plain second implementation, and against itself."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference

from fastface_cli.app.pipeline import Pipeline, Request
from fastface_cli.recipe.schema import Recipe

SIZE = {"width": 128, "height": 128}
AM1 = {"transforms": ["power", "scale"]}
AM2 = {
    "transforms": [
        {"kind": "adaptive_softmask", "k": [7.5, 5.0, 5.0, 5.0], "level": 0.65},
        {"kind": "scale", "g": [1.0, 1.55, 1.55, 1.55]},
    ],
    "invert_token_0": True,
}
DCG = {"identity": [1.0, 1.5, 1.5, 1.0], "text": [1.0, 3.0, 3.0, 1.0], "rescale": 0.75}


def recipe_of(kind="ddim", spacing="trailing", steps=4, **sections) -> Recipe:
    model = {
        "base": "base",
        "adapter": "adapter",
        "image_encoder": "encoder",
        "face": "face",
        "scheduler": {"kind": kind, "spacing": spacing},
    }
    return Recipe.model_validate(
        {"name": "test", "model": model, "sampling": {"steps": steps, **SIZE}, **sections}
    )


@pytest.fixture(scope="module")
def parts(miniature):
    return {role: miniature[role] for role in ("base", "adapter", "image_encoder")}


@pytest.fixture(scope="module")
def loaded(parts):
    return Pipeline.load(recipe_of(), parts, device="cpu", dtype="float32")


def pipeline_for(loaded: Pipeline, recipe: Recipe, parts) -> Pipeline:
    """The same loaded parts under another recipe (same models and LoRA scale)."""
    return loaded.with_recipe(recipe, parts)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


CASES = {
    "baseline": recipe_of(),
    "published": recipe_of(guidance=DCG, attention=AM1),
    "am2": recipe_of(attention=AM2),
    "fastface-am2": recipe_of(guidance=DCG, attention={**AM2, "blend": {}}),
    "euler": recipe_of("euler", guidance=DCG),
    "base": recipe_of("euler", None, 6, guidance={"identity": 5.0, "text": 5.0}),
    "lcm": recipe_of("lcm", None, guidance={"identity": 1.5, "text": 1.5}, attention=AM1),
    "turbo": recipe_of("euler_ancestral", guidance=DCG, attention=AM1),
    "one step": recipe_of(steps=1, guidance=DCG, attention=AM2),
    "six steps": recipe_of(steps=6, guidance=DCG, attention=AM2),
    "text first": recipe_of(guidance={**DCG, "order": "text_first"}),
    "independent": recipe_of(guidance={**DCG, "order": "independent", "rescale": 0.0}),
    "renorm": recipe_of(guidance={**DCG, "renorm": True}),
    "functions": recipe_of(
        guidance={
            "identity": {"function": "power_cosine", "scale": 2.0, "power": 1.5, "floor": 0.5},
            "text": {"function": "linear", "scale": 3.0, "inverse": True},
        }
    ),
    "some tokens, steps and blocks": recipe_of(
        guidance=DCG,
        attention={**AM1, "tokens": [0, 2], "steps": [1, 3], "blocks": ["mid", "up"], "invert_token_0": True},
    ),
    "softmask": recipe_of(attention={"transforms": ["softmask"], "blocks": ["down", "mid", "up"]}),
    "by branch": recipe_of(attention={"transforms": ["softmask"], "normalisation": "branch"}),
    "rgb crop": recipe_of(adapter={"crop_order": "rgb", "scale": 1.2}),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_method(name, loaded, parts, person):
    recipe = CASES[name]
    pipeline = pipeline_for(loaded, recipe, parts)
    request = Request("a person reading", 11, person, negative_prompt="blur" if name == "lcm" else None)
    picture = next(pipeline.generate([request]))
    from fastface_cli.models.loading import load_scheduler

    expected = reference.latents(
        recipe,
        load_scheduler(recipe, parts["base"], None),
        parts,
        person,
        request.prompt,
        request.negative_prompt,
        request.seed,
    )
    softmask = any("softmask" in transform.kind for transform in recipe.attention.transforms)
    for step, (ours, other) in enumerate(zip(picture.latents, expected, strict=True)):
        assert error(ours, other) <= (2e-4 if softmask else 1e-5), f"step {step}"


@pytest.mark.parametrize(
    ("name", "samples"),
    [("baseline", 4), ("published", 10), ("am2", 12), ("fastface-am2", 12), ("lcm", 8)],
)
def test_unet_samples(name, samples, loaded, parts, person):
    pipeline = pipeline_for(loaded, CASES[name], parts)
    calls = []
    hook = pipeline.unet.register_forward_hook(lambda _m, args, _o: calls.append(len(args[0])))
    try:
        picture = next(pipeline.generate([Request("a cat", 1, person)]))
    finally:
        hook.remove()
    assert len(calls) == 4, "one UNet call a step"
    assert sum(calls) == picture.unet_samples == samples


weights = st.one_of(
    st.sampled_from([0.0, 1.0, 1.5, 3.0]),
    st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=1, max_size=5),
)


@st.composite
def recipes(draw):
    masks = draw(st.booleans())
    return recipe_of(
        kind=draw(st.sampled_from(["ddim", "euler", "euler_ancestral", "lcm"])),
        steps=draw(st.integers(1, 3)),
        guidance={
            "order": draw(st.sampled_from(["identity_first", "text_first", "independent"])),
            "identity": draw(weights),
            "text": draw(weights),
            "renorm": draw(st.booleans()),
            "rescale": draw(st.sampled_from([0.0, 0.75])),
        },
        attention={
            "transforms": draw(st.sampled_from([[], ["power", "scale"]])) + (["softmask"] if masks else []),
            "invert_token_0": draw(st.booleans()),
            "normalisation": draw(st.sampled_from(["joint", "branch"])),
            "blend": draw(st.sampled_from([None, {"weight": 0.7}])),
        },
    )


@settings(max_examples=12, deadline=None, derandomize=True)
@given(recipes(), st.integers(0, 2**32), st.integers(1, 3))
def test_batch_equals_singles_and_pruned_equals_unpruned(loaded, parts, person, recipe, seed, batch):
    pipeline = pipeline_for(loaded, recipe, parts)
    other = replace(person, face_crop_bgr=person.face_crop_bgr[:, ::-1].copy())
    requests = [
        Request("a person", seed, person),
        Request("a portrait, neon", seed + 1, other, negative_prompt="blur", adapter_scale=0.3),
        Request("a dog", seed, person, adapter_scale=0.0),
    ]
    batched = list(pipeline.generate(requests, batch_size=batch))
    for request, picture in zip(requests, batched, strict=True):
        alone = next(pipeline.generate([request], prune=False))
        # Renorm divides by the norm of a difference, which magnifies rounding.
        assert error(picture.latents[-1], alone.latents[-1]) <= 1e-4


def test_a_run_leaves_no_trace(loaded, parts, person):
    before = dict(loaded.unet.attn_processors)
    request = Request("a cat", 4, person)
    first = next(loaded.generate([request]))
    with pytest.raises(RuntimeError, match="stop"):
        list(pipeline_for(loaded, CASES["am2"], parts).generate([request], on_step=_stop))
    again = next(loaded.generate([request]))
    assert loaded.unet.attn_processors == before
    assert torch.equal(first.latents, again.latents)


def _stop(_step, _latents) -> None:
    raise RuntimeError("stop")


def test_truncated_prompt_is_logged_once(parts, caplog):
    pipeline = Pipeline.load(recipe_of(), parts, device="cpu", dtype="float32")
    pipeline.backbone.encode_prompt("word " * 90)
    pipeline.backbone.encode_prompt("word " * 90)
    (record,) = caplog.records
    assert "this part of the prompt is ignored: " in record.getMessage()


def test_adapter_scale_zero_is_no_adapter(loaded, parts, person):
    other = replace(person, id_embedding=-person.id_embedding)
    first, two = (
        next(loaded.generate([Request("a cat", 3, who, adapter_scale=0.0)])) for who in (person, other)
    )
    assert torch.equal(first.latents, two.latents)
    assert not torch.equal(first.latents, next(loaded.generate([Request("a cat", 3, person)])).latents)


def test_recipes_with_other_models_do_not_share_parts(loaded, parts):
    from fastface_cli.errors import RecipeError

    changed = loaded.recipe.canonical()
    changed["adapter"]["lora_scale"] = 0.1
    with pytest.raises(RecipeError, match=r"lora_scale"):
        loaded.with_recipe(Recipe.model_validate_json(json.dumps(changed)), parts)
