"""Recipe files: the shipped recipes, lookup, inheritance, overrides, origins."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fastface_cli.errors import FastFaceError, RecipeError, UsageError
from fastface_cli.recipe.files import (
    SHORT_NAMES,
    find_recipe,
    list_recipes,
    load_recipe,
    load_recipe_data,
    recipe_names,
    recipes_folder,
)
from fastface_cli.recipe.yaml_text import to_yaml

METHODS = ("baseline", "dcg", "am1", "am2", "fastface", "fastface-am2")
FURTHER = ("dmd2", "tcd", "pcm", "hypercfg", "nitro", "nitrovibrant", "flash")
DISTILLED = ("hyper", "lightning", "lcm", "turbo", *FURTHER, "pocket")
STUDY = [f"pocket-study-{method}" for method in METHODS]
ADAPTED = [
    f"{model}-{adapter}{method}"
    for model, adapters in (
        *((model, ("plusface", "instantid", "pulid")) for model in ("hyper", "lightning", "lcm")),
        ("pocket", ("plusface",)),
    )
    for adapter in adapters
    for method in ("", "-dcg", "-am1", "-fastface")
]
RUNNABLE = [f"{model}-{method}" for model in DISTILLED for method in METHODS]
PUBLISHED = [name for name in RUNNABLE if not name.startswith(FURTHER)]
FACEID = {
    "base": "sdxl-base",
    "vae": "sdxl-vae-fp16-fix",
    "adapter": "ip-adapter-faceid-plusv2-sdxl",
    "image_encoder": "ip-adapter-image-encoder",
    "face": "buffalo_l",
}


def recipe(name, *overrides, **more):
    return load_recipe(name, overrides=overrides, **more).recipe


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# Shipped recipes


def test_every_model_has_every_method_and_a_reference():
    assert {info.name for info in list_recipes()} == {*RUNNABLE, *ADAPTED, *STUDY, "base", "pocket-base"}
    assert all(info.summary for info in list_recipes())


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid(name):
    actual = load_recipe(name)
    assert actual.recipe.name == SHORT_NAMES.get(name, name)
    assert set(actual.origins.values()) - {"default"}
    assert all(place == "default" or place.startswith("recipes/") for place in actual.origins.values())


@pytest.mark.parametrize("model", DISTILLED)
def test_short_names(model):
    method = "baseline" if model == "pocket" else "fastface"
    assert recipe(model) == recipe(f"{model}-{method}")


def references(name, steps):
    return load_recipe(name, flags={"sampling.steps": (steps, "--steps")}).recipe.references()


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_hyper(steps):
    lora = f"hyper-sdxl-{steps}-step-lora"
    assert references("hyper", steps) == FACEID | {"unet": "sdxl-base-unet", "distillation": lora}
    scheduler = recipe("hyper").model.scheduler
    assert (scheduler.kind, scheduler.spacing, scheduler.config) == ("ddim", "trailing", None)


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_lightning(steps):
    assert references("lightning", steps) == FACEID | {"unet": f"sdxl-lightning-{steps}-step-unet"}
    scheduler = recipe("lightning").model.scheduler
    assert (scheduler.kind, scheduler.spacing) == ("euler", "trailing")


def test_lcm():
    assert references("lcm", 5) == FACEID | {"unet": "sdxl-base-unet", "distillation": "lcm-lora-sdxl"}
    scheduler = recipe("lcm").model.scheduler
    assert (scheduler.kind, scheduler.spacing) == ("lcm", None)


def test_turbo():
    config = {"unet": "sdxl-turbo-unet", "scheduler": "sdxl-turbo-scheduler"}
    assert references("turbo", 4) == FACEID | config
    actual = recipe("turbo")
    assert (actual.model.scheduler.kind, actual.model.scheduler.spacing) == ("euler_ancestral", "trailing")
    assert (actual.sampling.width, actual.sampling.height) == (512, 512)


def test_base():
    actual = recipe("base")
    assert actual.references() == FACEID | {"unet": "sdxl-base-unet"}
    assert (actual.model.scheduler.kind, actual.model.scheduler.spacing) == ("euler", None)
    assert (actual.sampling.steps, actual.guidance.identity, actual.guidance.text) == (30, 5.0, 5.0)
    assert (actual.guidance.rescale, actual.guidance.order, actual.attention.active) == (
        0.0,
        "identity_first",
        False,
    )


def test_pocket():
    parts = {
        "base": "pocket-base",
        "adapter": "pocket-faceid",
        "image_encoder": "pocket-clip",
        "face": "pocket-face",
    }
    actual = recipe("pocket")
    assert actual.references() == parts | {"distillation": "pocket-4-step-lora"}
    assert (actual.sampling.steps, actual.sampling.width, actual.sampling.height) == (4, 128, 128)
    assert (actual.model.scheduler.kind, actual.model.scheduler.spacing) == ("ddim", "trailing")
    slow = recipe("pocket-base")
    assert slow.references() == parts
    assert (slow.sampling.steps, slow.sampling.width, slow.guidance.text) == (30, 128, 5.0)
    assert (slow.model.scheduler.kind, slow.model.scheduler.spacing) == ("euler", None)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name):
    model, _, method = name.partition("-")
    actual = recipe(name)
    assert actual.sampling.steps == 4
    size = {"turbo": 512, "pocket": 128}.get(model, 1024)
    assert (actual.sampling.width, actual.sampling.height) == (size, size)
    assert (actual.adapter.scale, actual.adapter.lora_scale, actual.adapter.crop_order) == (0.8, 0.6, "bgr")
    guidance = actual.guidance
    assert (guidance.order, guidance.renorm) == ("identity_first", False)
    if method in ("dcg", "fastface", "fastface-am2"):
        assert guidance.identity == [1.0, 1.5, 1.5, 1.0]
        assert guidance.text == [1.0, 3.0, 3.0, 1.0]
        assert guidance.rescale == 0.75
    else:
        weight = 1.5 if model == "lcm" else 1.0
        assert (guidance.identity, guidance.text, guidance.rescale) == (weight, weight, 0.0)
    attention = actual.canonical()["attention"]
    assert attention["blend"] == ({"weight": 0.7, "eps": 1e-6} if method == "fastface-am2" else None)
    assert attention["invert_token_0"] is method.endswith("am2")
    assert (attention["blocks"], attention["tokens"], attention["steps"]) == (
        ["down", "up"],
        [0, 1, 2, 3],
        "all",
    )
    assert attention["normalisation"] == "joint"
    if method in ("baseline", "dcg"):
        assert attention["transforms"] == []
    elif method in ("am1", "fastface"):
        assert attention["transforms"] == [
            {"kind": "power", "p": {"down": 1.3, "mid": 1.0, "up": 1.3}},
            {"kind": "scale", "g": {"down": 1.55, "mid": 1.0, "up": 1.45}, "cap": 10.0},
        ]
    else:
        slopes, gains = [7.5, 5.0, 5.0, 5.0], [1.0, 1.55, 1.55, 1.55]
        assert attention["transforms"] == [
            {
                "kind": "adaptive_softmask",
                "k": {"down": slopes, "mid": None, "up": slopes},
                "level": {"down": 0.65, "mid": None, "up": 0.65},
            },
            {"kind": "scale", "g": {"down": gains, "mid": None, "up": gains}, "cap": 10.0},
        ]


def test_every_model_part_is_known_to_the_manifest():
    manifest = pytest.importorskip("fastface_cli.store.manifest").load_manifest()
    used = set()
    for name in recipe_names():
        model = recipe(name).canonical()["model"]
        for role in ("base", "unet", "distillation", "vae", "adapter", "image_encoder", "face"):
            part = model[role]
            used |= set(part.values()) if isinstance(part, dict) else {part}
        used.add(model["scheduler"]["config"])
    assert used - {None} <= set(manifest)


# Looking up


def test_a_name_is_found_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hyper").mkdir()
    assert find_recipe("hyper") == recipes_folder() / "hyper-fastface.yaml"


def test_a_path_is_taken_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "mine.yaml", "extends: hyper-am1\n")
    write(tmp_path, "no-suffix", "extends: hyper-am2\n")
    assert recipe("mine.yaml").name == "mine"
    assert recipe(tmp_path / "mine.yaml").guidance == recipe("hyper-am1").guidance
    assert recipe("no-suffix").attention == recipe("hyper-am2").attention


@pytest.mark.parametrize(
    ("name", "near"),
    [("hyper-fastfce", "hyper-fastface"), ("lightening", "lightning"), ("poket", "pocket")],
)
def test_an_unknown_name_names_the_nearest(name, near):
    with pytest.raises(RecipeError, match=f"there is no recipe '{name}'") as caught:
        load_recipe(name)
    assert near in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["", ".", "..", "../recipes", "a\0b", "x" * 5000, "~", "/", "models", "-x"])
def test_odd_names_are_errors(name):
    with pytest.raises(RecipeError):
        load_recipe(name)


# Extending


def test_later_parents_and_the_file_itself_win(tmp_path):
    write(
        tmp_path, "one.yaml", "summary: one\nadapter: {scale: 0.1, lora_scale: 0.1}\nguidance: {text: 1.1}\n"
    )
    write(tmp_path, "sub/two.yaml", "adapter: {lora_scale: 0.2}\nguidance: {text: [2, 2]}\n")
    path = write(
        tmp_path,
        "sub/three.yaml",
        "extends: [hyper-baseline, ../one.yaml, two.yaml]\nsampling:\n  steps: 8\nguidance: {identity: 3}\n",
    )
    actual = load_recipe(path)
    assert (actual.recipe.adapter.scale, actual.recipe.adapter.lora_scale) == (0.1, 0.2)
    assert (actual.recipe.guidance.identity, actual.recipe.guidance.text) == (3.0, [2.0, 2.0])
    assert (actual.recipe.name, actual.recipe.summary) == ("three", "")
    assert actual.origins["adapter.scale"] == f"{tmp_path}/sub/../one.yaml:2"
    assert actual.origins["guidance.text"] == f"{tmp_path}/sub/two.yaml:2"
    assert actual.origins["sampling.steps"] == f"{path}:3"
    assert actual.origins["model.base"] == "recipes/models/hyper.yaml:4"
    assert actual.origins["attention.blend"] == "default"


def test_a_weight_of_another_kind_replaces(tmp_path):
    path = write(
        tmp_path,
        "a.yaml",
        "extends: hyper\nguidance: {text: {function: cap, scale: 3, floor: 1}, identity: 2}\n",
    )
    actual = recipe(path)
    assert actual.guidance.text.function == "cap"
    assert actual.guidance.identity == 2.0
    below = write(tmp_path, "b.yaml", "extends: a.yaml\nguidance: {text: {function: linear}}\n")
    assert recipe(below).guidance.text.model_dump() == {
        "function": "linear",
        "scale": 1.0,
        "power": 1.0,
        "inverse": False,
        "floor": None,
    }, "a new function brings nothing of the old one"
    tuned = write(tmp_path, "c.yaml", "extends: a.yaml\nguidance: {text: {scale: 4}}\n")
    assert (recipe(tuned).guidance.text.function, recipe(tuned).guidance.text.scale) == ("cap", 4.0)
    number = write(tmp_path, "d.yaml", "extends: a.yaml\nguidance: {text: 1.5}\n")
    assert recipe(number).guidance.text == 1.5


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_references_of_another_kind_replace(tmp_path):
    path = write(
        tmp_path,
        "a.yaml",
        f"extends: hyper\nmodel:\n  distillation: {{repo: me/lora, commit: {COMMIT}, file: x.safetensors}}\n"
        "  loras: [{file: style.safetensors, scale: 0.5}]\n",
    )
    actual = recipe(path)
    assert actual.model.step_choices() is None
    assert actual.model.distillation.repo == "me/lora"
    assert actual.model.loras[0].file == str(tmp_path / "style.safetensors")
    table = write(tmp_path, "b.yaml", "extends: a.yaml\nmodel: {distillation: {6: six}, loras: []}\n")
    assert recipe(table, "sampling.steps=6").model.distillation == {6: "six"}
    added = write(tmp_path, "c.yaml", "extends: hyper\nmodel: {distillation: {6: six}}\n")
    assert sorted(recipe(added).model.distillation) == [1, 2, 4, 6, 8]
    other = write(tmp_path, "d.yaml", f"extends: a.yaml\nmodel: {{distillation: {{commit: {'f' * 40}}}}}\n")
    assert recipe(other).model.distillation.commit == "f" * 40
    assert recipe(other).model.distillation.repo == "me/lora"


def test_transforms_replace(tmp_path):
    path = write(tmp_path, "a.yaml", "extends: hyper\nattention: {transforms: [softmask]}\n")
    assert [transform.kind for transform in recipe(path).attention.transforms] == ["softmask"]


def test_paths_in_a_file_are_relative_to_it(tmp_path, monkeypatch):
    path = write(
        tmp_path,
        "deep/a.yaml",
        "extends: hyper\nmodel: {base: ./sdxl, adapter: ../faceid.BIN, "
        f"vae: 'hub:a/b@{COMMIT}:x.safetensors', face: /abs/pack, "
        "image_encoder: ip-adapter-image-encoder}\n",
    )
    monkeypatch.chdir(tmp_path)
    model = recipe("deep/a.yaml").model
    assert model == recipe(path).model
    assert model.base == str(tmp_path / "deep/sdxl")
    assert model.adapter == str(tmp_path / "faceid.BIN")
    assert model.vae == f"hub:a/b@{COMMIT}:x.safetensors"
    assert (model.face, model.image_encoder) == ("/abs/pack", "ip-adapter-image-encoder")


def test_another_base_brings_its_own_unet(tmp_path):
    path = write(tmp_path, "a.yaml", "extends: hyper\nmodel:\n  base: ./style.safetensors\n")
    actual = load_recipe(path)
    assert actual.recipe.model.unet is None
    assert actual.origins["model.unet"] == f"{path}:3"
    assert recipe("hyper", "model.base=x.safetensors").model.unet is None
    assert recipe("hyper", "model.base=x.safetensors", "model.unet=sdxl-base-unet").model.unet is not None
    assert recipe("lightning", "model.base=x.safetensors").references()["unet"].startswith("sdxl-lightning")


def test_a_section_that_is_commented_out_is_ignored(tmp_path):
    path = write(tmp_path, "a.yaml", "extends: hyper\nguidance:\n  # text: 3\nattention:\n")
    assert recipe(path).digest() == recipe("hyper").digest()


def test_cycles_are_refused(tmp_path):
    write(tmp_path, "a.yaml", "extends: b.yaml\n")
    path = write(tmp_path, "b.yaml", "summary: x\nextends: [hyper, a.yaml]\n")
    with pytest.raises(RecipeError, match=r"a\.yaml:1: field extends: .*b\.yaml extends this file in turn"):
        load_recipe(path)
    itself = write(tmp_path, "c.yaml", "extends: c.yaml\n")
    with pytest.raises(RecipeError, match=r"c\.yaml:1: field extends"):
        load_recipe(itself)


def test_a_lattice_of_parents_is_read_once_each(tmp_path):
    write(tmp_path, "0.yaml", "extends: hyper\n")
    for level in range(1, 14):
        write(tmp_path, f"{level}.yaml", f"extends: [{', '.join([f'{level - 1}.yaml'] * 8)}]\n")
    assert recipe(tmp_path / "13.yaml").digest() == recipe("hyper").digest()
    for level in range(14, 20):
        write(tmp_path, f"{level}.yaml", f"extends: {level - 1}.yaml\n")
    with pytest.raises(RecipeError, match="too many levels"):
        load_recipe(tmp_path / "19.yaml")


@pytest.mark.parametrize(
    ("extends", "says"),
    [
        ("hyper-fastfac", "there is no recipe 'hyper-fastfac'"),
        ("methods/dgc", "there is no recipe 'methods/dgc'"),
        ("gone.yaml", "there is no recipe file"),
        ("3", "must be a recipe's name"),
        ("[[hyper]]", "must be a recipe's name"),
        ('"a\\0.yaml"', "must be a recipe's name"),
        ("{a: b}", "must be a recipe's name"),
    ],
)
def test_bad_extends_names_the_line(tmp_path, extends, says):
    path = write(tmp_path, "a.yaml", f"summary: x\nextends: {extends}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.message.startswith(f"{path}:2: field extends: {says}")


# Overriding


def test_the_last_word(tmp_path):
    path = write(tmp_path, "a.yaml", "extends: hyper\nsampling: {steps: 2, width: 512}\n")
    actual = load_recipe(
        path,
        flags={"sampling.steps": (8, "--steps"), "sampling.height": (768, "--size")},
        overrides=["sampling.steps=4", "sampling.steps=1", "adapter.scale = 0.5"],
    )
    sampling = actual.recipe.sampling
    assert (sampling.steps, sampling.width, sampling.height) == (1, 512, 768)
    assert actual.recipe.adapter.scale == 0.5
    assert actual.origins["sampling.steps"] == "--set"
    assert actual.origins["sampling.height"] == "--size"
    assert actual.origins["sampling.width"] == f"{path}:2"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=5), st.sampled_from([1, 2, 4, 8]))
def test_the_last_override_wins_over_flags(values, flag):
    actual = load_recipe(
        "hyper",
        flags={"sampling.steps": (flag, "--steps")},
        overrides=[f"sampling.steps={value}" for value in values],
    )
    assert actual.recipe.sampling.steps == values[-1]


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("guidance.text=[1,2,2,1]", "guidance.text", [1.0, 2.0, 2.0, 1.0]),
        ("guidance.text={function: cosine, scale: 2}", "guidance.text.function", "cosine"),
        ("guidance={order: text_first}", "guidance.order", "text_first"),
        ("attention.transforms.0.p=1.1", "attention.transforms.0.p", 1.1),
        ("attention.transforms.1.g.up=[1,2]", "attention.transforms.1.g.up", [1.0, 2.0]),
        ("attention.blend.eps=1e-4", "attention.blend.eps", 1e-4),
        ("model.distillation.4=mine", "model.distillation.4", "mine"),
        ("model.vae=null", "model.vae", None),
        ("prompt='a: b'", "prompt", "a: b"),
        ("prompt=a=b", "prompt", "a=b"),
        ("negative_prompt=''", "negative_prompt", ""),
        ("guidance.renorm=yes", "guidance.renorm", True),
        ("attention.steps=[0,1]", "attention.steps", [0, 1]),
    ],
)
def test_overrides_reach_every_value(override, field, value):
    actual = load_recipe("hyper", overrides=[override])
    assert actual.origins[field] == "--set"
    data = actual.recipe.canonical()
    for part in field.split("."):
        data = data[int(part)] if isinstance(data, list) else data[part]
    assert data == value


def test_overrides_inside_bare_transforms():
    actual = recipe("hyper", "attention.transforms=[power, scale]", "attention.transforms.0.p=2")
    assert actual.attention.transforms[0].p == 2.0
    assert actual.attention.transforms[1].cap == 10.0
    loras = recipe(
        "hyper", "model.loras=[{file: x.safetensors, scale: 0.5}]", "model.loras.0.scale=1"
    ).model.loras
    assert (loras[0].file, loras[0].scale) == ("x.safetensors", 1.0)


def test_steps_without_a_checkpoint_name_the_choices():
    for name, steps, choices in (("hyper", 3, "1, 2, 4, 8"), ("lightning", 1, "2, 4, 8"), ("pocket", 8, "4")):
        with pytest.raises(RecipeError) as caught:
            load_recipe(name, flags={"sampling.steps": (steps, "--steps")})
        assert caught.value.message == (
            f"--steps: field sampling.steps: no checkpoint is distilled for {steps} steps; "
            f"choose one of {choices}"
        )
        assert caught.value.exit_code == 2


# A local stack


def local_stack(folder: Path) -> Path:
    for name in ("pipe", "clip"):
        (folder / name).mkdir(parents=True)
    (folder / "faceid_plusv2.bin").touch()
    return folder


def test_a_stack_replaces_the_models(tmp_path, monkeypatch):
    stack = local_stack(tmp_path / "stack")
    actual = load_recipe("turbo", stack=stack, flags={"sampling.steps": (3, "--steps")})
    model = actual.recipe.model
    assert actual.recipe.references() == {
        "base": str(stack / "pipe"),
        "adapter": str(stack / "faceid_plusv2.bin"),
        "image_encoder": str(stack / "clip"),
        "face": "buffalo_l",
    }
    assert (model.scheduler.kind, model.scheduler.spacing) == ("euler_ancestral", "trailing")
    assert actual.origins["model.base"] == actual.origins["model.scheduler.config"] == "--stack"
    assert actual.origins["model.face"] == "recipes/models/turbo.yaml:9"
    (stack / "face").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe("turbo", stack=Path("stack")).recipe.model.face == str(stack / "face")
    lora = ["model.loras=[{file: x.safetensors}]"]
    assert len(load_recipe("hyper", stack=stack, overrides=lora).recipe.model.loras) == 1


def test_an_incomplete_stack_is_named(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        load_recipe("hyper", stack=tmp_path / "gone")
    stack = local_stack(tmp_path / "stack")
    (stack / "faceid_plusv2.bin").unlink()
    (stack / "clip").rmdir()
    with pytest.raises(UsageError, match=r"lacks clip and faceid_plusv2\.bin") as caught:
        load_recipe("hyper", stack=stack)
    assert caught.value.exit_code == 2


# Writing


@pytest.mark.parametrize("name", ["hyper", "turbo-am2", "pocket-base", "lcm-fastface-am2"])
@pytest.mark.parametrize("origins", [True, False])
def test_resolved_yaml_reads_back(tmp_path, name, origins):
    actual = load_recipe(
        name,
        overrides=[
            r'prompt="caf\u00e9: \"x\" # no\n\u2028\u0085 \U0001F600 \t"',
            "negative_prompt='off'",
            "model.loras=[{file: './a b.safetensors', scale: 1e-7}]",
            "guidance.text={function: power_cosine, power: 2}",
        ],
    )
    path = write(tmp_path, "again.yaml", to_yaml(actual, origins=origins))
    again = load_recipe(path).recipe
    assert again.canonical() | {"model": None} == actual.recipe.canonical() | {"model": None}
    assert again.name == actual.recipe.name
    data = yaml.safe_load(path.read_text())
    assert data["model"]["loras"] == [{"file": "./a b.safetensors", "scale": 1e-7}]
    assert data["guidance"] == actual.recipe.canonical()["guidance"]


def test_plain_data_reads_back():
    actual = load_recipe("hyper", overrides=["guidance.text=2"])
    again = load_recipe_data(actual.recipe.canonical(), "photo.png", flags={"sampling.steps": (8, "--steps")})
    assert again.recipe.guidance == actual.recipe.guidance
    assert again.recipe.references()["distillation"] == "hyper-sdxl-8-step-lora"
    assert again.origins["guidance.text"] == "photo.png"
    with pytest.raises(RecipeError, match=r"photo\.png: field bad: unknown key"):
        load_recipe_data({**actual.recipe.canonical(), "bad": 1}, "photo.png")
    with pytest.raises(FastFaceError):
        load_recipe_data([], "photo.png")
