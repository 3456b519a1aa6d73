"""Errors of invalid recipes: file, line, field and hint, and never another exception."""

import json

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastface_cli.errors import FastFaceError, RecipeError
from fastface_cli.recipe.files import load_recipe, recipe_names
from fastface_cli.recipe.problems import fields
from fastface_cli.recipe.schema import Recipe


def failure(path, content, **more):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path), **more)
    return caught.value


HYPER = "extends: hyper-fastface\n"

VALUES = [
    # content after `extends`, line, field, what it says, what the hint says
    ("guidence: {text: 1}", 2, "guidence", "unknown key", "guidance"),
    ("guidance:\n  order: text_first\n  txet: 3", 4, "guidance.txet", "unknown key", "guidance.text"),
    ("steps: 4", 2, "steps", "unknown key", "sampling.steps"),
    ("guidance: {qqq: 4}", 2, "guidance.qqq", "unknown key", "valid here: order, identity"),
    ("model:\n  scheduler:\n    kid: ddim", 4, "model.scheduler.kid", "unknown key", "scheduler.kind"),
    ("model:\n  loras:\n    - file: x\n      scal: 1", 5, "model.loras.0.scal", "unknown key", "0.scale"),
    ("4: x", 2, "4", "is not a valid name", None),
    ("sampling:\n  steps: 4.0", 3, "sampling.steps", "must be a whole number, not 4.0", None),
    ("sampling:\n  steps: four", 3, "sampling.steps", "must be a whole number, not 'four'", None),
    ("sampling:\n  steps: true", 3, "sampling.steps", "must be a whole number, not true", None),
    ("sampling:\n  steps: 0", 3, "sampling.steps", "must be at least 1, not 0", None),
    ("sampling:\n  steps: 3", 3, "sampling.steps", "distilled for 3 steps; choose one of 1, 2, 4, 8", None),
    ("sampling: {width: 100}", 2, "sampling.width", "must be a multiple of 8, not 100", None),
    ("sampling: {height: 5000}", 2, "sampling.height", "must be at most 4096", None),
    ("sampling: {width: 99999999999999999999999999}", 2, "sampling.width", "must be", None),
    ("sampling: 4", 2, "sampling", "must be a mapping", None),
    ("sampling: [4]", 2, "sampling", "must be a mapping", None),
    ("adapter: {scale: '0.5'}", 2, "adapter.scale", "must be a number, not '0.5'", None),
    ("adapter: {scale: .nan}", 2, "adapter.scale", "must be finite", None),
    ("adapter: {scale: 1e999}", 2, "adapter.scale", "must be finite", None),
    ("adapter: {crop_order: rbg}", 2, "adapter.crop_order", "must be one of bgr, rgb, not 'rbg'", "rgb"),
    ("guidance: {order: identity}", 2, "guidance.order", "must be one of identity_first", "identity_first"),
    ("guidance: {order: no}", 2, "guidance.order", "not false", "quotes"),
    ("guidance: {rescale: 1.5}", 2, "guidance.rescale", "must be at most 1, not 1.5", None),
    ("guidance: {renorm: 1}", 2, "guidance.renorm", "must be true or false, not 1", None),
    ("guidance: {text: strong}", 2, "guidance.text", "a list with one number per step, or a f", None),
    ("guidance: {text: null}", 2, "guidance.text", "not null", None),
    ("guidance: {text: [1, x]}", 2, "guidance.text.1", "must be a number, not 'x'", None),
    ("guidance:\n  text:\n    - 1\n    - no\n", 5, "guidance.text.1", "must be a number, not false", None),
    ("guidance: {text: []}", 2, "guidance.text", "must not be empty", None),
    ("guidance: {text: {scale: 1}}", 2, "guidance.text.function", "is missing", None),
    ("guidance: {text: {function: cosin}}", 2, "guidance.text.function", "must be one of constant", "cosine"),
    ("guidance: {text: {function: cap, flor: 1}}", 2, "guidance.text.flor", "unknown key", "text.floor"),
    ("guidance: {text: {function: cap, power: 0}}", 2, "guidance.text.power", "must be more than 0", None),
    ("attention: {transforms: power}", 2, "attention.transforms", "must be a list, not 'power'", None),
    ("attention: {transforms: [pow]}", 2, "attention.transforms.0", "must be one of power", "power"),
    ("attention: {transforms: [{p: 1}]}", 2, "attention.transforms.0", "needs a 'kind'", None),
    ("attention: {transforms: [3]}", 2, "attention.transforms.0", "or the name of a transform", None),
    ("attention: {transforms: [{kind: power, g: 1}]}", 2, "attention.transforms.0.g", "unknown key", "kind"),
    ("attention:\n  transforms:\n    - power\n    - kind: scale\n      g: {up: 1, dwn: 2}\n", 6,
     "attention.transforms.1.g.dwn", "unknown key", "g.down"),
    ("attention:\n  transforms:\n    - kind: scale\n      g: {up: [1, x]}\n", 5,
     "attention.transforms.0.g.up.1", "must be a number", None),
    ("attention:\n  transforms:\n    - power\n    - kind: scale\n      cap: 0", 6,
     "attention.transforms.1.cap", "must be more than 0", None),
    ("attention:\n  blocks: [mid]\n  transforms:\n    - kind: power\n      p: {up: 1}", 6,
     "attention.transforms.0.p", "power.p has no value for the mid blocks, which attention.blocks", None),
    ("attention:\n  transforms:\n    - kind: power\n      p: [1, -1]", 5,
     "attention.transforms.0.p", "power.p must be in [0, 100], not -1", None),
    ("attention: {blocks: [dwon]}", 2, "attention.blocks.0", "must be one of down, mid, up", "down"),
    ("attention: {blocks: [up, up]}", 2, "attention.blocks", "a value is given twice", None),
    ("attention: {tokens: [32]}", 2, "attention.tokens.0", "must be at most 31, not 32", None),
    ("attention: {steps: some}", 2, "attention.steps", "must be 'all' or a list of step indices", None),
    ("attention: {steps: [-1]}", 2, "attention.steps.0", "must be at least 0, not -1", None),
    ("attention: {blend: 0.7}", 2, "attention.blend", "must be a mapping", None),
    ("attention: {normalisation: off}", 2, "attention.normalisation", "must be one of joint", "quotes"),
    ("model: {vae: 3}", 2, "model.vae", "must be a name, a path, or 'repo'", None),
    ("model: {vae: {repo: a/b}}", 2, "model.vae.commit", "is missing", None),
    (f"model: {{vae: {{repo: a, commit: {'a' * 40}}}}}", 2, "model.vae.repo", "must be OWNER/NAME", None),
    ("model: {vae: {repo: a/b, commit: main}}", 2, "model.vae.commit", "40 hexadecimal digits", None),
    ("model: {unet: {x: y}}", 2, "model.unet", "or one of these for each step count", None),
    ("model: {unet: {0: x}}", 2, "model.unet.0", "a step count is a whole number from 1 to 1000", None),
    ("model: {unet: {4: y, x: y}}", 2, "model.unet.x", "a step count is a whole number from 1 to 1000", None),
    ("model: {unet: {}}", 2, "model.unet", "or one of these for each step count, not a mapping", None),
    ("model: {unet: {4: 5}}", 2, "model.unet.4", "must be a name, a path", None),
    ("model: {base: null}", 2, "model.base", "not null", None),
    ("model:\n  scheduler: {kind: dimm}", 3, "model.scheduler.kind", "must be one of ddim", "ddim"),
    ("seed: -1", 2, "seed", "must be at least 0, not -1", None),
    ("seed: 9223372036854775808", 2, "seed", "is too large", None),
    ("prompt: 42", 2, "prompt", "must be text, not 42", "quotes"),
    ("summary: [a]", 2, "summary", "must be text, not a list", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "field", "says", "hint"), VALUES)
def test_a_bad_value_names_line_and_field(tmp_path, text, line, field, says, hint):
    path = tmp_path / "a.yaml"
    error = failure(path, HYPER + text)
    assert error.exit_code == 2
    assert error.message.startswith(f"{path}:{line}: field {field}: ")
    assert says in error.message
    assert len(error.message.split("\n")) == 1, "one mistake, one line"
    if hint is not None:
        assert hint in error.hint


TEXTS = [
    ("summary: a\nsummary: b\n", ":2: 'summary' is given twice"),
    ("guidance:\n  text: 1\n  text: 1\n", ":3: 'text' is given twice"),
    ("guidance:\n\ttext: 1\n", ":2: is not valid YAML: found character '\\t'"),
    ("guidance: {text: 1\n", ":2: is not valid YAML"),
    ("a: 1\n---\nb: 2\n", ":2: is not valid YAML: "),
    ("", ": is empty"),
    ("# only a comment\n", ": is empty"),
    ("- a\n- b\n", ":1: a recipe must be a mapping"),
    ("just text", ":1: a recipe must be a mapping"),
    ("? [a]\n: 1\n", ":1: 'this' is not a name"),
    ("on: 1\n", ":1: 'on' is not a name"),
    ("~: 1\n", ":1: '~' is not a name"),
    ('"a\\nb": 1\n', ":1: 'a\\nb' is not a name"),
    ("summary: !!python/object:os.system x\n", ":1: a YAML tag"),
    ("summary: !!set {a}\n", ":1: a YAML tag"),
    ("summary: !!int x\n", ":1: cannot be read as int"),
    ("summary: !!bool x\n", ":1: a YAML tag"),
    ('summary: "\\uD800"\n', ":1: cannot be read as str"),
    ('summary: "\\UFFFFFFFF"\n', "is not valid YAML"),
    ("base: &a {x: 1}\nsampling:\n  <<: *a\n", ":3: '<<' is not supported in a recipe"),
    ("summary: *gone\n", ":1: is not valid YAML: found undefined alias"),
    ("a: &a [*a]\n", "nested too deeply"),
    ("a: " + "[" * 5000 + "\n", "too deeply"),
    ("a: " + "[" * 50 + "]" * 50 + "\n", ":1: is nested too deeply"),
    (f"seed: {'9' * 5000}\n", ":1: cannot be read as int"),
    ("a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 18)), "too many"),
    ("summary: " + "x" * 70000, "is larger than 64 KiB"),
    (b"\xff\xfe\x00", ":1: is not UTF-8 text"),
    (b"summary: x\nprompt: caf\xe9\n", ":2: is not UTF-8 text"),
    (b"summary: \x00\n", "is not valid YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "says"), TEXTS)
def test_bad_yaml_names_the_line(tmp_path, content, says):
    path = tmp_path / "a.yaml"
    error = failure(path, content)
    assert error.message.startswith(str(path))
    assert says in error.message


def test_a_byte_order_mark_and_windows_lines_are_fine(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfextends: hyper\r\nguidance:\r\n  text: 3\r\n")
    actual = load_recipe(path)
    assert actual.recipe.guidance.text == 3.0
    assert actual.origins["guidance.text"] == f"{path}:3"


def test_yaml_scalars_mean_what_people_expect(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "extends: hyper\nattention: {blend: {eps: 1e-6, weight: 1}}\n"
        "guidance: {renorm: yes, text: 2, identity: 1.}\n"
        "prompt: 12:30:45\nnegative_prompt: 2026-01-01\nseed: 010\n"
    )
    actual = load_recipe(path).recipe
    assert (actual.attention.blend.eps, actual.attention.blend.weight) == (1e-6, 1.0)
    assert (actual.guidance.renorm, actual.guidance.text, actual.guidance.identity) == (True, 2.0, 1.0)
    assert (actual.prompt, actual.negative_prompt, actual.seed) == ("12:30:45", "2026-01-01", 10)


def test_aliases_within_reason_are_fine(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("extends: hyper\nguidance:\n  text: &w [1, 2, 2, 1]\n  identity: *w\n")
    actual = load_recipe(path)
    assert actual.recipe.guidance.identity == [1.0, 2.0, 2.0, 1.0]


def test_several_mistakes_are_listed_and_the_rest_counted(tmp_path):
    path = tmp_path / "a.yaml"
    lines = "\n".join(f"wrong{i}: 1" for i in range(8))
    error = failure(path, f"{HYPER}{lines}\n")
    assert len(error.message.split("\n")) == 6
    assert error.message.split("\n")[0] == f"{path}:2: field wrong0: unknown key"
    assert error.message.endswith("... and 3 more")


def test_a_page_of_mistakes_is_cut_short(tmp_path):
    error = failure(tmp_path / "a.yaml", f"{HYPER}guidance: {{text: [{'x, ' * 5000}]}}\n{'k' * 900}: 1\n")
    assert len(error.message) < 2000
    assert error.message.endswith("... and many more")


def test_a_bad_value_in_a_parent_names_the_parent(tmp_path):
    (tmp_path / "parent.yaml").write_text("extends: hyper\nguidance:\n  order: first\n")
    error = failure(tmp_path / "child.yaml", "extends: parent.yaml\nsampling: {steps: 4}\n")
    assert error.message.startswith(f"{tmp_path}/parent.yaml:3: field guidance.order:")


def test_missing_parts_are_named(tmp_path):
    error = failure(tmp_path / "a.yaml", "summary: x\nmodel:\n  base: b\n")
    fields_named = [line.split("field ")[1].split(":")[0] for line in error.message.split("\n")]
    assert fields_named == ["model.adapter", "model.face", "model.scheduler"]
    assert failure(tmp_path / "b.yaml", "summary: x\n").message.endswith(":1: field model: is missing")


SETS = [
    ("guidance.txet=1", "field guidance.txet: unknown key", "guidance.text"),
    ("steps=3", "field steps: unknown key", "sampling.steps"),
    ("guidance.text.foo=1", "field guidance.text.function: is missing", "guidance.text.floor"),
    ("sampling.steps.x=1", "field sampling.steps: must be a whole number, not a mapping", None),
    ("x", "must be field=VALUE", "guidance.text"),
    ("=3", "must be field=VALUE", "guidance.text"),
    ("extends=hyper", "'extends' is only supported in a file", None),
    (
        "attention.transforms.7.p=1",
        "field attention.transforms.7: attention.transforms has 2 entries",
        "counted from 0",
    ),
    (
        "attention.transforms.p=1",
        "field attention.transforms.p: attention.transforms has 2 entries",
        "counted from 0",
    ),
    ("guidance.text=[1,", "is not valid YAML", "quotes"),
    ("prompt=a: b: c", "is not valid YAML", "quotes"),
    ("..=1", "must be field=VALUE", None),
    ("a..b=1", "must be field=VALUE", None),
]


@pytest.mark.parametrize(("override", "says", "hint"), SETS)
def test_bad_overrides_are_quoted(override, says, hint):
    with pytest.raises(RecipeError) as caught:
        load_recipe("hyper", overrides=[override])
    assert caught.value.message.startswith(f"--set {override}: {says}")
    assert hint is None or hint in caught.value.hint


def test_bad_flags_are_named():
    with pytest.raises(
        RecipeError, match=r"^--size: field sampling\.width: must be a multiple of 8, not 100$"
    ):
        load_recipe("hyper", flags={"sampling.width": (100, "--size")})


JSONS = [
    ("{", ":1: is not valid JSON"),
    ('{\n "a": 1,\n "a": 2}', "'a' is given twice"),
    ('{"seed": NaN}', "NaN is not a number"),
    ('{"seed": Infinity}', "Infinity is not a number"),
    ("[1]", ":1: a configuration must be a JSON object"),
    ("", ":1: is not valid JSON"),
    ("[" * 60000, "nested too deeply"),
    ("[" * 30 + "]" * 30, "nested too deeply"),
    (f'{{"seed": {"9" * 5000}}}', "is not valid JSON"),
    ('{"scheduler": "hyper", "prompt": "\\ud800"}', "surrogate"),
    ('{"a\\ud800": 1}', "is not a name"),
    (b"\xff", ":1: is not UTF-8"),
    ('{\n\t"scheduler": "hyper",\n\t"sed": 1\n}', ":3: field sed: unknown key"),
    ('{"extends": "hyper",\n"guidance": {"txet": 1}}', ":2: field guidance.txet: unknown key"),
]


@pytest.mark.parametrize(("content", "says"), JSONS)
def test_bad_json_names_the_line(tmp_path, content, says):
    error = failure(tmp_path / "a.json", content)
    assert error.message.startswith(f"{tmp_path}/a.json")
    assert says in error.message


def test_files_that_cannot_be_read(tmp_path):
    for path, says in (
        (tmp_path / "gone.yaml", "there is no recipe file"),
        (tmp_path / f"{'x' * 300}.yaml", "cannot read the recipe file"),
    ):
        with pytest.raises(RecipeError, match=says):
            load_recipe(str(path))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(str(tmp_path / "folder.yaml"))
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    with pytest.raises(RecipeError):
        load_recipe(str(loop))
    with pytest.raises(RecipeError):
        load_recipe("a\0.yaml")


# Nothing but the one family of errors, whatever comes in

names = st.sampled_from(
    [*{part for field in fields() for part in field.split(".")}, "extends", "kind", "p", "g", "k", "level",
     "function", "scale", "down", "up", "repo", "commit", "file", "4", "<<", "on", ""]
)  # fmt: skip
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["hyper", "methods/dcg", "power", "softmask", "all", "cosine", "text_first", "ddim", 4])
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names | st.integers(0, 9), inner, max_size=4),
    max_leaves=12,
)
sections = st.fixed_dictionaries(
    {},
    optional={
        "extends": st.sampled_from(["hyper", ["models/lcm", "methods/am2"], "a.yaml"]) | values,
        "model": values,
        "sampling": values,
        "adapter": values,
        "guidance": values | st.dictionaries(st.sampled_from(["order", "identity", "text"]), values),
        "attention": values | st.dictionaries(st.sampled_from(["transforms", "blocks", "steps"]), values),
        "seed": values,
        "name": values,
    },
)
many = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def loads_or_says_why(path, content, overrides=()):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8", errors="surrogatepass")
    actual = outcome(str(path), overrides)
    if isinstance(actual, FastFaceError):
        assert actual.exit_code == 2
        assert actual.message.strip()
        assert actual.message.encode("utf-8")
    else:
        again = Recipe.model_validate_json(json.dumps(actual.recipe.canonical()))
        assert again.digest() == actual.recipe.digest()
        assert set(actual.origins) >= {"name", "model.base", "sampling.steps"}


def outcome(name, overrides=()):
    try:
        return load_recipe(name, overrides=overrides)
    except FastFaceError as error:
        return error


@many
@given(content=st.binary(max_size=200))
def test_any_bytes(tmp_path, content):
    loads_or_says_why(tmp_path / "a.yaml", content)
    loads_or_says_why(tmp_path / "a.json", content)


@many
@given(content=st.text(st.sampled_from("aemodl:,-{}[]&*!|>'\"\\#%@`?~<0123.\n \t\u0085\ufeff"), max_size=60))
@example(content="model: {unet: {}}")
def test_any_text(tmp_path, content):
    loads_or_says_why(tmp_path / "a.yaml", content)
    loads_or_says_why(tmp_path / "b.yaml", HYPER + content)


@many
@given(tree=sections | values)
def test_any_tree(tmp_path, tree):
    loads_or_says_why(tmp_path / "a.yaml", yaml.safe_dump(tree, allow_unicode=True))
    loads_or_says_why(tmp_path / "b.json", json.dumps(tree))
    if isinstance(tree, dict):
        loads_or_says_why(tmp_path / "c.yaml", yaml.safe_dump({"extends": "hyper-am2", **tree}))


@many
@given(
    field=st.lists(names | st.text(max_size=4), max_size=4),
    text=st.text(max_size=12) | values.map(json.dumps),
)
def test_any_override(tmp_path, field, text):
    loads_or_says_why(tmp_path / "a.yaml", HYPER, [f"{'.'.join(field)}={text}"])
    loads_or_says_why(tmp_path / "a.yaml", HYPER, [text])


@many
@given(field=st.sampled_from(fields()), value=values)
def test_any_value_anywhere(tmp_path, field, value):
    loads_or_says_why(tmp_path / "a.yaml", HYPER, [f"{field}={json.dumps(value)}"])


@many
@given(name=st.text(max_size=20) | st.sampled_from(recipe_names()).map(lambda name: f"{name}.yaml/.."))
def test_any_name(name):
    actual = outcome(name)
    if isinstance(actual, FastFaceError):
        assert actual.exit_code == 2
    else:
        assert name in recipe_names() or "/" in name
