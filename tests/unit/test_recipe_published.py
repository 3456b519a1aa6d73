"""JSON configurations of the published code."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastface_cli.errors import FastFaceError, RecipeError
from fastface_cli.recipe.files import load_recipe
from fastface_cli.recipe.published import TOP_KEYS

PUBLISHED = Path(__file__).parents[1] / "data" / "published"
METHODS = ("baseline", "dcg", "am1", "am2", "fastface", "fastface-am2")
CASES = [
    f"{case}-{row}"
    for case, rows in {
        "am_only-scalepow": ("hyper", "lcm"),
        "am_only-softmask_scheduled": ("hyper", "lcm"),
        "baseline": ("lightning",),
        "dcg_only-dcg2_style": ("hyper", "lcm"),
        "fastface-am1_and_dcg": ("hyper", "lcm", "turbo"),
        "fastface-am2_and_dcg": ("hyper", "lcm"),
    }.items()
    for row in rows
]


def published(method, /, **changes):
    data = json.loads((PUBLISHED / f"{method}.json").read_text())
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        place = data
        for part in parents:
            place = place[part]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    return data


@pytest.fixture
def load(tmp_path):
    def load(data, **more):
        path = tmp_path / "case.json"
        path.write_text(json.dumps(data, indent=1))
        return load_recipe(path, **more).recipe

    return load


def refused(load, data):
    with pytest.raises(RecipeError) as caught:
        load(data)
    return caught.value


@pytest.mark.parametrize("row", ["hyper", "lightning", "lcm", "turbo", "pocket"])
@pytest.mark.parametrize("method", METHODS)
def test_published_configurations_are_the_shipped_recipes(load, method, row):
    size = {"turbo": 512, "pocket": 128}.get(row, 1024)
    changes = {"model_name": row, "pipe_kwargs__width": size, "pipe_kwargs__height": size}
    assert load(published(method, **changes)).digest() == load_recipe(f"{row}-{method}").recipe.digest()


def test_reset_takes_the_weights_of_the_row(load):
    for row, weight in (("hyper", 1.0), ("lightning", 1.0), ("turbo", 1.0), ("lcm", 1.5), ("base", 5.0)):
        actual = load(published("baseline", model_name=row, pipe_kwargs__guidance_scale_a=7.0))
        assert (actual.guidance.identity, actual.guidance.text) == (weight, weight)
    kept = load(published("baseline", reset_gs_to_default=False, pipe_kwargs__guidance_scale_a=7.0))
    assert (kept.guidance.identity, kept.guidance.text) == (7.0, 1.0)


@pytest.mark.parametrize("name", CASES)
def test_golden_cases(golden, name):
    case, row = name.rsplit("-", 1)
    path = golden / "cases" / f"{name}.json"
    resolved = load_recipe(path, stack=golden)
    actual = resolved.recipe
    model = actual.model
    assert (model.base, model.adapter) == (str(golden / "pipe"), str(golden / "faceid_plusv2.bin"))
    assert (model.image_encoder, model.unet, model.distillation) == (str(golden / "clip"), None, None)
    assert (model.vae, model.loras, model.scheduler.config) == (None, [], None)
    kind, spacing = {
        "hyper": ("ddim", "trailing"),
        "lightning": ("euler", "trailing"),
        "lcm": ("lcm", None),
        "turbo": ("euler_ancestral", "trailing"),
    }[row]
    assert (model.scheduler.kind, model.scheduler.spacing) == (kind, spacing)
    assert (actual.sampling.steps, actual.sampling.width, actual.sampling.height) == (4, 128, 128)
    assert (actual.adapter.scale, actual.adapter.lora_scale, actual.adapter.crop_order) == (0.8, 0.6, "bgr")
    assert (actual.prompt, actual.negative_prompt, actual.seed) == (
        "a photo of a person reading a book",
        None,
        50,
    )
    method = {
        "am_only-scalepow": "am1",
        "am_only-softmask_scheduled": "am2",
        "baseline": "baseline",
        "dcg_only-dcg2_style": "dcg",
        "fastface-am1_and_dcg": "fastface",
        "fastface-am2_and_dcg": "fastface-am2",
    }[case]
    shipped = load_recipe(f"{row}-{method}").recipe
    assert actual.guidance == shipped.guidance
    assert actual.attention == shipped.attention
    assert actual.name == name
    assert resolved.origins["sampling.steps"] == f"{path}:3"
    assert resolved.origins["seed"].startswith(f"{path}:")
    assert resolved.origins["model.base"] == "--stack"


def test_without_a_stack_the_row_brings_its_models_and_needs_its_steps(load):
    actual = load(published("fastface", pipe_kwargs__num_inference_steps=8))
    assert actual.references()["distillation"] == "hyper-sdxl-8-step-lora"
    error = refused(load, published("fastface", pipe_kwargs__num_inference_steps=6))
    assert "no checkpoint is distilled for 6 steps; choose one of 1, 2, 4, 8" in error.message


@pytest.mark.parametrize(
    ("kind", "order", "identity", "text"),
    [(1, "text_first", 3.0, 2.0), (2, "independent", 3.0, 2.0), (3, "identity_first", 2.0, 3.0)],
)
def test_weights_are_named_by_what_they_weigh(load, kind, order, identity, text):
    changes = {"pipe_kwargs__guidance_scale_a": 2.0, "pipe_kwargs__guidance_scale_b": 3.0}
    constant = published(
        "baseline", reset_gs_to_default=False, pipe_kwargs__dcg_kwargs__dcg_type=kind, **changes
    )
    actual = load(constant).guidance
    assert (actual.order, actual.identity, actual.text) == (order, identity, text)
    listed = load(published("dcg", pipe_kwargs__dcg_kwargs__dcg_type=kind)).guidance
    weights = {2.0: [1.0, 1.5, 1.5, 1.0], 3.0: [1.0, 3.0, 3.0, 1.0]}
    assert (listed.identity, listed.text) == (weights[identity], weights[text])


FUNCTIONS = {
    "linear": ("linear", 1.0, False, None),
    "inv_linear": ("linear", 1.0, True, None),
    "clamped_lin": ("linear", 1.0, False, 0.5),
    "inv_clamp_linear": ("linear", 1.0, True, 0.5),
    "cos": ("cosine", 1.0, False, None),
    "inv_cos": ("cosine", 1.0, True, None),
    "pcs": ("power_cosine", 4.0, False, None),
    "inv_pcs": ("power_cosine", 4.0, True, None),
    "clamped_pcs": ("power_cosine", 4.0, False, 0.5),
    "inv_clamped_pcs": ("power_cosine", 4.0, True, 0.5),
    "capshape": ("cap", 1.0, False, None),
    "ccshape": ("cap", 1.0, False, 0.5),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_published_schedule(load, name):
    data = published("dcg", pipe_kwargs__guidance_scale_b=2.5, pipe_kwargs__dcg_kwargs__b_scheduler=name)
    data["pipe_kwargs"]["dcg_kwargs"]["sch_kwargs"]["b"] = {"c": 0.5, "s": 4}
    guidance = load(data).guidance
    weight = guidance.text
    assert guidance.identity == [1.0, 1.5, 1.5, 1.0]
    assert (weight.function, weight.power, weight.inverse, weight.floor) == FUNCTIONS[name]
    assert weight.scale == 2.5


def test_renorm_and_rescale(load):
    def guidance(pre, post, rescale):
        changes = {"term_preproc": pre, "term_postproc": post, "rescale": rescale}
        return load(
            published("dcg", **{f"pipe_kwargs__dcg_kwargs__{key}": value for key, value in changes.items()})
        ).guidance

    assert (guidance("", "", 0.9).renorm, guidance("", "", 0.9).rescale) == (False, 0.0)
    assert (guidance("renorm", "rescale", 0.9).renorm, guidance("renorm", "rescale", 0.9).rescale) == (
        True,
        0.9,
    )
    assert guidance("term_renorm", "rescaled", 0.5).renorm is True
    assert guidance("", "rescaled", 0.5).rescale == 0.5
    assert guidance("", "no rescale", 0.5).rescale == 0.0
    assert guidance("", "rescale", ...).rescale == 0.7


def patched(**changes):
    return published("am2", **{f"am_patch_kwargs__{key}": value for key, value in changes.items()})


def test_attention_of_part_of_the_network(load):
    actual = load(
        patched(target_parts=["up"], target_tokens=[3, 1], target_tsteps=[2, 0], apply_adain=True)
    ).attention
    assert (actual.blocks, actual.tokens, actual.steps) == (["up"], [1, 3], [2, 0])
    assert (actual.blend.weight, actual.blend.eps) == (0.7, 1e-6)
    assert load(patched(target_tsteps=[3, 2, 1, 0])).attention.steps == "all"
    six = patched(target_tsteps=[0, 1, 2, 3])
    six["pipe_kwargs"]["num_inference_steps"] = 8
    assert load(six).attention.steps == [0, 1, 2, 3]
    assert load(patched(target_tsteps=[])).attention.steps == []
    assert load(patched(target_tokens=None)).attention.tokens == [0, 1, 2, 3]
    assert load(patched(inverse_neg_transforms=...)).attention.invert_token_0 is False


@pytest.mark.parametrize("parts", [None, [], ...])
def test_no_parts_are_all_parts(load, parts):
    actual = load(patched(target_parts=parts, apply_schedule=False, am_transforms=["adaptive_softmask"]))
    assert actual.attention.blocks == ["down", "mid", "up"]
    transform = actual.attention.transforms[0]
    assert (transform.k.down, transform.k.mid, transform.k.up) == (12.5, 1.0, 12.5)
    assert (transform.level.down, transform.level.mid, transform.level.up) == (0.6, 1.0, 0.6)
    error = refused(load, patched(target_parts=parts))
    assert "field am_patch_kwargs.target_parts: includes mid" in error.message


def test_the_schedule_moves_slope_level_and_gain_but_not_power(load):
    transforms = load(patched(am_transforms=["pow", "softmask", "adaptive_softmask", "scale"])).canonical()[
        "attention"
    ]["transforms"]
    slopes, gains = [7.5, 5.0, 5.0, 5.0], [1.0, 1.55, 1.55, 1.55]
    assert transforms[0]["p"] == {"down": 1.3, "mid": 1.0, "up": 1.3}
    assert transforms[1]["k"] == transforms[2]["k"] == {"down": slopes, "mid": None, "up": slopes}
    assert transforms[1]["threshold"] == 0.5
    assert transforms[2]["level"] == {"down": 0.65, "mid": None, "up": 0.65}
    assert transforms[3]["g"] == {"down": gains, "mid": None, "up": gains}


def test_what_a_configuration_may_leave_out(load):
    actual = load({"scheduler": "turbo"})
    assert (actual.guidance.order, actual.guidance.identity, actual.guidance.text) == (
        "identity_first",
        5.0,
        5.0,
    )
    assert (actual.sampling.steps, actual.sampling.width, actual.adapter.scale) == (4, 512, 0.8)
    assert (actual.attention.active, actual.prompt, actual.seed) == (False, None, None)
    assert load(published("dcg", faceid_lora_scale=1.0)).adapter.lora_scale == 1.0
    extra = published(
        "dcg", dataset_meta={"data_dir": "x"}, t2i=False, prompt="p", negative_prompt="", seed=3
    )
    assert (load(extra).prompt, load(extra).negative_prompt, load(extra).seed) == ("p", "", 3)


BAD = [
    ({"sed": 3}, "field sed: unknown key", "'seed'"),
    ({"pipe_kwargs__guidance_scale": 3}, "field pipe_kwargs.guidance_scale: unknown key", "guidance_scale_"),
    ({"pipe_kwargs__dcg_kwargs__dcg": 3}, "field pipe_kwargs.dcg_kwargs.dcg: unknown key", "dcg_type"),
    ({"pipe_kwargs__dcg_kwargs__dcg_type": 4}, "must be 1 (text first), 2 (independent) or 3", None),
    ({"pipe_kwargs__dcg_kwargs__dcg_type": True}, "must be 1 (text first)", None),
    (
        {"pipe_kwargs__dcg_kwargs__a_scheduler": "cosine"},
        "a_scheduler: must be one of default, custom",
        "cos",
    ),
    ({"pipe_kwargs__dcg_kwargs__a_scheduler": "pcs"}, "sch_kwargs.a.s: is missing, and a_scheduler", None),
    ({"pipe_kwargs__dcg_kwargs__a_scheduler": "custom"}, "sch_kwargs.custom.a: must be a list", None),
    ({"pipe_kwargs__dcg_kwargs__term_postproc": 3}, "term_postproc: must be text", None),
    ({"pipe_kwargs__dcg_kwargs": 3}, "field pipe_kwargs.dcg_kwargs: must be an object", None),
    ({"pipe_kwargs": []}, "field pipe_kwargs: must be an object", None),
    ({"pipe_kwargs__width": 100}, "field sampling.width: must be a multiple of 8, not 100", None),
    ({"ip_adapter_scale": "0.8"}, "field adapter.scale: must be a number, not '0.8'", None),
    ({"model_name": "hypr"}, "field model_name: must be one of hyper", "'hyper'"),
    ({"model_name": ...}, "field model_name: is missing", "hyper, lightning"),
    ({"scheduler": "lcm"}, "field model_name: contradicts scheduler 'lcm'", None),
    ({"method": "pulid"}, "field method: must be faceid", None),
    ({"t2i": True}, "field t2i: must be false", None),
    ({"patch_pipe": "yes"}, "field patch_pipe: must be true or false", None),
    ({"am_patch_kwargs": ...}, "field am_patch_kwargs: is missing, and patch_pipe is true", None),
    ({"am_patch_kwargs__am_transforms": ["pwo"]}, "must be one of pow, scale, softmask, adapt", "'pow'"),
    ({"am_patch_kwargs__am_transforms": "pow"}, "field am_patch_kwargs.am_transforms: must be a list", None),
    ({"am_patch_kwargs__am_transforms": [["pow"]]}, "must be one of pow", None),
    (
        {"am_patch_kwargs__am_transforms": ...},
        "field am_patch_kwargs.am_transforms: is missing",
        "a list of pow",
    ),
    ({"am_patch_kwargs__target_parts": ["upp"]}, "field attention.blocks.0: must be one of down", "'up'"),
    (
        {"am_patch_kwargs__target_tokens": [4]},
        "field attention.tokens: faceid_plusv2 has tokens 0 to 3, not 4",
        None,
    ),
    ({"am_patch_kwargs__target_tsteps": 3}, "field am_patch_kwargs.target_tsteps: must be a list", None),
    ({"am_patch_kwargs__apply_adain": 0.7}, "apply_adain: must be true or false", None),
    ({"am_patch_kwargs__target_step": []}, "field am_patch_kwargs.target_step: unknown key", "target_tsteps"),
    ({"seed": -1}, "field seed: must be at least 0", None),
    ({"prompt": ["a", "b"]}, "field prompt: must be text, not a list", None),
]


@pytest.mark.parametrize(("changes", "says", "hint"), BAD)
def test_bad_configurations_name_line_and_key(load, tmp_path, changes, says, hint):
    error = refused(load, published("am1", **changes))
    assert error.message.startswith(f"{tmp_path}/case.json:")
    assert error.message.split(":")[1].isdecimal()
    assert says in error.message
    assert hint is None or hint in error.hint
    assert error.exit_code == 2


def test_the_line_is_the_line_of_the_value(load, tmp_path):
    data = published("am1", am_patch_kwargs__am_transforms=["pow", "scael"])
    error = refused(load, data)
    lines = (tmp_path / "case.json").read_text().split("\n")
    number = next(i for i, line in enumerate(lines, start=1) if "scael" in line)
    assert f"case.json:{number}: " in error.message


keys = [
    *TOP_KEYS,
    "guidance_scale_a",
    "dcg_kwargs",
    "dcg_type",
    "sch_kwargs",
    "custom",
    "a",
    "b",
    "target_parts",
]
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["hyper", "pow", "custom", "pcs", "rescale", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(keys), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
places = ["pipe_kwargs", "pipe_kwargs__dcg_kwargs", "pipe_kwargs__dcg_kwargs__sch_kwargs", "am_patch_kwargs"]
spots = [
    *TOP_KEYS,
    *places,
    *[f"pipe_kwargs__dcg_kwargs__{key}" for key in ("dcg_type", "rescale", "a_scheduler", "b_scheduler")],
    *[
        f"am_patch_kwargs__{key}"
        for key in ("target_parts", "target_tokens", "target_tsteps", "am_transforms")
    ],
]


@settings(max_examples=60, deadline=None)
@given(method=st.sampled_from(METHODS), spot=st.sampled_from(spots), value=anything)
def test_any_value_anywhere_is_read_or_refused(tmp_path_factory, method, spot, value):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "any.json"
    data = published("am1" if spot.startswith("am_patch") else method)
    place = data
    *parents, last = spot.split("__")
    for part in parents:
        place = place[part]
    place[last] = value
    path.write_text(json.dumps(data))
    actual = outcome(path)
    if isinstance(actual, FastFaceError):
        assert actual.exit_code == 2
        assert str(path) in actual.message
    else:
        assert actual.recipe.digest()


def outcome(path):
    try:
        return load_recipe(path)
    except FastFaceError as error:
        return error
