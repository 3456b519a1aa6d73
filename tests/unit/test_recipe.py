"""The schema: interpolation over steps, digests, reading back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fastface_cli.errors import RecipeError
from fastface_cli.recipe.schema import Recipe, per_step

MODEL = {
    "base": "b",
    "unet": {1: "one", 4: "four"},
    "distillation": {4: "d4", 8: "d8"},
    "adapter": "a",
    "image_encoder": "i",
    "face": "f",
    "scheduler": {"kind": "ddim"},
}
numbers = st.floats(-10, 10, width=32)
lists = st.lists(numbers, min_size=1, max_size=12)
steps = st.integers(1, 40)


def recipe(**parts):
    return Recipe.model_validate({"name": "x", "model": MODEL, **parts})


@given(numbers, steps)
def test_a_constant_is_repeated(value, count):
    assert per_step(value, count) == [value] * count


@given(lists)
def test_a_list_of_the_right_length_is_kept(values):
    assert per_step(values, len(values)) == values


@given(lists, steps)
def test_interpolation_keeps_ends_bounds_and_length(values, count):
    actual = per_step(values, count)
    assert len(actual) == count
    assert actual[0] == values[0]
    if count > 1:
        assert actual[-1] == pytest.approx(values[-1])
    assert min(values) - 1e-9 <= min(actual) <= max(actual) <= max(values) + 1e-9


@given(numbers, numbers, st.integers(2, 12), st.integers(2, 40))
def test_a_straight_line_stays_straight(first, slope, given_steps, count):
    line = [first + slope * i / (given_steps - 1) for i in range(given_steps)]
    expected = [first + slope * i / (count - 1) for i in range(count)]
    assert per_step(line, count) == pytest.approx(expected, abs=1e-6)


@given(lists, steps)
def test_interpolation_commutes_with_reversal(values, count):
    if count > 1:
        assert per_step(values[::-1], count) == pytest.approx(per_step(values, count)[::-1], abs=1e-6)


def test_published_weights_at_other_step_counts():
    weights = [1.0, 3.0, 3.0, 1.0]
    assert per_step(weights, 1) == [1.0]
    assert per_step(weights, 2) == [1.0, 1.0]
    assert per_step(weights, 3) == [1.0, 3.0, 1.0]
    assert per_step(weights, 7) == [1.0, 2.0, 3.0, 3.0, 3.0, 2.0, 1.0]


def test_steps_pick_the_checkpoint_and_must_exist_in_every_table():
    actual = recipe()
    assert actual.model.step_choices() == [4]
    assert actual.references()["unet"] == "four"
    assert actual.references()["distillation"] == "d4"
    with pytest.raises(ValidationError, match="no checkpoint is distilled for 8 steps; choose one of 4"):
        recipe(sampling={"steps": 8})
    with pytest.raises(RecipeError, match="distilled for 2 steps"):
        actual.model.unet_for(2)


def test_any_step_count_without_tables():
    model = {**MODEL, "unet": "u", "distillation": None}
    actual = Recipe.model_validate({"name": "x", "model": model, "sampling": {"steps": 17}})
    assert actual.model.step_choices() is None
    assert actual.references()["unet"] == "u"
    assert "distillation" not in actual.references()


def test_style_loras_are_references_by_index():
    model = {**MODEL, "loras": [{"file": "a.safetensors"}, {"file": "b.safetensors", "scale": 0.5}]}
    actual = Recipe.model_validate({"name": "x", "model": model})
    assert actual.references()["lora.0"] == "a.safetensors"
    assert actual.references()["lora.1"] == "b.safetensors"


def shuffled(value, random):
    if isinstance(value, dict):
        items = list(value.items())
        random.shuffle(items)
        return {key: shuffled(child, random) for key, child in items}
    if isinstance(value, list):
        return [shuffled(child, random) for child in value]
    return value


RICH = {
    "guidance": {
        "order": "text_first",
        "identity": {"function": "power_cosine", "scale": 2, "power": 3, "floor": 1, "inverse": True},
        "text": [1, 2.5, 3],
        "renorm": True,
        "rescale": 0.5,
    },
    "attention": {
        "transforms": [
            "power",
            {"kind": "scale", "g": {"down": [1, 2], "up": 3}, "cap": 5},
            {"kind": "softmask", "k": 3.5},
            {"kind": "adaptive_softmask", "level": {"up": [0.5, 0.6], "down": 0.1}},
        ],
        "tokens": [1, 3],
        "steps": [0, 2],
        "blend": {"weight": 0.25},
    },
    "prompt": "a ca\u00f1on, \u5c71",
    "negative_prompt": "",
    "seed": 7,
}


@given(st.randoms())
def test_digest_is_stable_under_key_order(random):
    whole = {"name": "x", "model": MODEL, **RICH}
    assert Recipe.model_validate(shuffled(whole, random)).digest() == Recipe.model_validate(whole).digest()


def test_digest_covers_what_determines_the_pixels():
    base = recipe().digest()
    assert recipe(name="y", summary="other words").digest() == base
    assert recipe(adapter={"scale": 0.8}).digest() == base, "a default spelled out changes nothing"
    assert recipe(guidance={"text": 1}).digest() == base, "an integer is the same number"
    assert recipe(adapter={"scale": 0.81}).digest() != base
    assert recipe(negative_prompt="").digest() != base, "an empty text is not the absence of one"


@pytest.mark.parametrize("parts", [{}, RICH])
def test_canonical_form_reads_back(parts):
    actual = recipe(**parts)
    again = Recipe.model_validate_json(json.dumps(actual.canonical()))
    assert again == actual
    assert again.digest() == actual.digest()
