"""The documentation is correct: every command runs, every example is valid.

The blocks of a page run in order, in a separate folder with the photos and data sets that the page names.
Commands with the pocket recipes run on two people and two prompts. Commands that require a GPU, the network
or minutes are only checked: they parse, their recipes and metrics exist, and they exit as expected.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from support.doc_pages import LANGUAGES, PAGES, ROOT, Block, blocks, code_spans, links, options, parse, words

from fastface_cli import cli
from fastface_cli.app.licensing import artifacts_of
from fastface_cli.evaluation.metrics.base import make_metrics, registry
from fastface_cli.recipe.files import load_recipe, recipe_names
from fastface_cli.recipe.schema import Recipe

INSTALLERS = ("pip", "pipx", "uv", "apt-get")
"""Programs that change the machine and are not run."""
SLOW = ("docs/evaluating.md",)
"""Pages whose evaluations run only with `-m slow`."""
WITH_SERVER = ("docs/serving.md",)
"""Pages whose Python needs a server; tests/server runs it."""
OPTIONS_OF_OTHERS = {"--excludes"}
"""Options of uv in sentences."""
PEOPLE = ("anna", "joel")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create the files of a reader: photos of one person, prompts, the examples of the checkout."""
    monkeypatch.setenv("FASTFACE_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    here = Path.cwd()
    portrait = Image.open(ROOT / "examples" / "portrait.png").convert("RGB")
    for name in ("me.jpg", "a.jpg", "b.jpg"):
        portrait.save(here / name, quality=95)
    mini = here / "examples" / "mini"
    (mini / "id_photos").mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "portrait.png", here / "examples")
    (here / "theirs").mkdir()
    for index, name in enumerate(PEOPLE):
        photo = ROOT / "examples" / "mini" / "id_photos" / f"{name}.png"
        shutil.copy(photo, mini / "id_photos")
        for prompt in range(2):
            shutil.copy(photo, here / "theirs" / f"{2 * index + prompt}.png")
    (here / "order.txt").write_text("".join(f"{name}\n" for name in PEOPLE))
    for file in (mini / "prompts.txt", here / "prompts.txt"):
        file.write_text("a person smiling\nwatercolor; a person\n")
    shutil.copy(ROOT / "tests" / "data" / "published" / "fastface.json", here / "theirs.json")
    return here


Out = Callable[[], str]


@pytest.fixture
def out(capfd: pytest.CaptureFixture[str]) -> Out:
    """Return a function that returns both streams since the last call."""

    def out() -> str:
        return "".join(capfd.readouterr())

    return out


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_works(page: str, folder: Path, out: Out) -> None:
    follow(page, folder, out, evaluate=page not in SLOW)


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW)
def test_every_evaluation_of_a_page_runs(page: str, folder: Path, out: Out) -> None:
    follow(page, folder, out, evaluate=True)


def follow(page: str, folder: Path, out: Out, *, evaluate: bool) -> None:
    """Run a page, block by block."""
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.where}: name the language of the block"
        if block.file:
            (folder / block.file).write_text(block.text, encoding="utf-8")
        if block.language == "yaml":
            assert block.file, f"{block.where}: name the recipe's file after 'yaml'"
            load_recipe(folder / block.file)
        if block.language == "python" and page not in WITH_SERVER:
            exec(compile(block.text, block.where, "exec"), names)
        if block.language == "toml":
            tomllib.loads(block.text)
        if block.language == "jsonl":
            make_photos(block, folder)
        if block.language in ("sh", "console"):
            commands = list(block.commands())
            assert commands, f"{block.where}: no command in it; a console block has '$ ' before each"
            for command, shown in commands:
                out()
                run(command, shown, block.where, out, evaluate=evaluate)


def make_photos(block: Block, folder: Path) -> None:
    """Create the photos of a manifest."""
    for line in block.text.splitlines():
        person = json.loads(line)
        for photo in (*person["photos"], person["held_out"]):
            (folder / photo).parent.mkdir(exist_ok=True)
            shutil.copy(folder / "me.jpg", folder / photo)


def run(command: str, shown: str, where: str, out: Out, *, evaluate: bool) -> None:
    """Run a command of a page; `shown` is the output on the page."""
    arguments, target = words(command)
    if arguments[0] != "fastface":
        check_other_program(arguments, where)
        return
    arguments = arguments[1:]
    name, values = parse(arguments)
    recipes = recipes_of(name, values)
    expected, more = plan(name, values, recipes, evaluate=evaluate)
    if expected is None:
        return
    code = cli.run([*arguments, *more])
    output = out()
    assert code in expected, f"{where}: {command}\nended with {code}\n{output}"
    if shown.startswith("error: "):
        assert code != 0
        assert shown.splitlines()[0] in output, f"{where}: {command}\nsays\n{output}"
    if target:
        Path(target).write_text(output)


def plan(
    name: str, values: dict[str, object], recipes: list[Recipe], *, evaluate: bool
) -> tuple[tuple[int, ...] | None, list[str]]:
    """Return the valid exit codes and additional flags; None if the command is only parsed."""
    import torch

    packaged = all(part.packaged for recipe in recipes for part in artifacts_of(recipe).values())
    match name:
        case "generate" if packaged:
            return (0,), ["--force"]
        case "generate":
            if values["commercial"]:
                return (2,), []
            return None if torch.cuda.is_available() else (4,), []
        case "eval":
            make_metrics(str(values["metrics"] or "id").split(","))  # an unknown one is refused
            local = packaged and values["engine"] == "local"
            assert Path(str(values["dataset"])).exists() or values["dataset"] == "diversefaces"
            # The metrics that a run takes by itself are tested in test_eval; two are quicker.
            quick = [] if values["metrics"] else ["--metrics", "id,cost"]
            return (0,) if local and evaluate else None, quick
        case "eval score" | "eval report" | "eval index" | "eval merge" | "eval compare":
            return (0,) if evaluate else None, []
        case "bench":
            return (0,) if packaged and evaluate else None, ["--repeats", "2", "--no-cold", "--device", "cpu"]
        case "doctor":
            return None if values["fix"] else (0, 3, 4), ["--offline"]
        case "download":
            return None if values["names"] == ["diversefaces"] else (0,), ["--dry-run"]
        case "cache remove" | "serve":
            return None, []
        case _:
            return (0,), []


def recipes_of(name: str, values: dict[str, object]) -> list[Recipe]:
    """Return the recipes of a command, with its overrides."""
    given = values.get("recipe") or []
    given = [given] if isinstance(given, str) else given
    assert isinstance(given, list)
    if name == "generate" and not given and not values["from_"]:
        given = ["hyper-fastface"]
    if name == "eval compare":
        return []
    changes = values.get("set_") or []
    assert isinstance(changes, list)
    return [load_recipe(name, overrides=changes).recipe for name in given]


def check_other_program(arguments: list[str], where: str) -> None:
    """Check that scripts, modules and make targets exist; installers only need a known name."""
    program, rest = arguments[0], arguments[1:]
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert rest[0] in targets, f"{where}: no target {rest[0]}"
    elif program in ("python", ".venv/bin/python"):
        if rest[:2] == ["-m", "pip"]:
            return
        files = [
            word for word in rest if word.endswith(".py") or word.startswith(("tests", "docs", "examples"))
        ]
        if rest[0] == "-m" and rest[1] != "pytest":
            files = [rest[1].replace(".", "/") + ".py"]
        assert files, f"{where}: {' '.join(arguments)}"
        for file in files:
            assert (ROOT / file).exists(), f"{where}: there is no {file}"
    elif "/" in program:
        assert (ROOT / program).is_file(), f"{where}: there is no {program}"
    else:
        assert program in INSTALLERS, f"{where}: {program} is unknown"


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_commands_and_options_within_sentences_exist(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PAGES, page, ROOT / page)
    known = options()
    every = OPTIONS_OF_OTHERS.union(*known.values())
    for span in code_spans(page):
        if not span.startswith(("fastface ", "--")):
            continue
        name = ""
        for word in span.split()[1:]:
            if f"{name} {word.split('|')[0]}".strip() not in known:
                break
            name = f"{name} {word.split('|')[0]}".strip()
        if span.startswith("fastface ") and not span.split()[1].startswith("-"):
            assert name, f"{page}: `{span}` is no command"
        valid = known[name] if span.startswith("fastface ") else every
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", span):
            assert option in valid, f"{page}: `{span}`: there is no {option}"


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_have_a_target(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PAGES, page, ROOT / page)
    for link in links(page):
        if link.startswith(("http://", "https://")):
            continue
        file, _, place = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if place:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert place in anchors, f"{page}: {link}"


def test_the_page_on_recipes_shows_every_field_and_the_recipe_that_it_names(folder: Path) -> None:
    actual = {block.file: block for block in blocks("docs/writing-a-recipe.md") if block.language == "yaml"}
    for name, block in actual.items():
        (folder / str(name)).write_text(block.text)
    shown = load_recipe(folder / "every-field.yaml")
    assert shown.recipe.digest() == load_recipe("pocket-fastface-am2").recipe.digest()
    left_out = {field for field, origin in shown.origins.items() if origin == "default"}
    assert {field for field in left_out if not field.endswith(".mid")} == set()
    mixed = load_recipe(folder / "mixed.yaml").recipe
    assert mixed.digest() == load_recipe("pocket-fastface").recipe.digest()


def test_the_page_on_evaluating_names_every_metric() -> None:
    from fastface_cli.evaluation.setup import FULL, POCKET, PUBLISHED

    rows = [line for line in PAGES["docs/evaluating.md"].read_text().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    table = {name: row for row in cells if len(row) == 4 for name in re.findall(r"`([^`]+)`", row[0])}
    ours = {
        name: metric for name, metric in registry().items() if metric.__module__.startswith("fastface_cli.")
    }
    assert set(table) == set(ours)
    for name, metric in ours.items():
        printed = re.findall(r"`([^`]+)`", table[name][1])
        columns = [column.name for column in metric().columns]
        if "and the same endings" in table[name][1]:
            columns = [name]
        assert set(columns) <= set(printed), name
        sets = {"pocket": POCKET, "full size": FULL, "published": PUBLISHED}
        expected = {word for word, names in sets.items() if name in names}
        assert set(table[name][3].replace("all", ", ".join(sets)).split(", ")) == expected, name


def test_readme_lists_the_samples_and_sizes_of_recipes() -> None:
    from fastface_cli.sampling.guidance import plan as plan_of

    def samples(name: str) -> int:
        recipe = load_recipe(name).recipe
        times = [1000.0 * (1 - step / recipe.sampling.steps) for step in range(recipe.sampling.steps)]
        return sum(len(step.branches) for step in plan_of(recipe.guidance, recipe.attention, times))

    text = PAGES["README.md"].read_text()
    methods = dict(re.findall(r"^\| `([\w-]+)` \| (?:off|decoupled) \|.*\| ([^|]+) \|$", text, re.M))
    names = set(recipe_names())
    assert {name.partition("-")[2] for name in names if name.startswith("turbo-")} == set(methods)
    for method, printed in methods.items():
        for model in ("hyper", "lightning", "turbo", "pocket"):
            assert printed.split(" ")[0] == str(samples(f"{model}-{method}")), method
        lcm = re.search(r"\((\d+) with LCM\)", printed)
        assert (lcm[1] if lcm else printed) == str(samples(f"lcm-{method}")), method
    assert "`base` runs two branches at each of 30 steps: 60 samples" in text
    assert samples("base") == 60
    for model, printed in re.findall(r"^\| `(\w+)`[^|]*\|[^|]*\|[^|]*\| ([\d.]+) GB \|", text, re.M):
        parts = {part.name: part.bytes for part in artifacts_of(load_recipe(model).recipe).values()}
        assert f"{sum(parts.values()) / 1e9:.1f}" == printed, model


def script(path: Path) -> ModuleType:
    """Import a script of the checkout."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_page_of_help_texts_is_up_to_date() -> None:
    module = script(ROOT / "docs" / "render_cli.py")
    assert module.PAGE.read_text(encoding="utf-8") == module.render(), "run python docs/render_cli.py"


def test_the_notebook_runs_and_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script(ROOT / "examples" / "make_notebook.py")
    cells = json.loads(module.PAGE.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    assert sources == module.CELLS, "run python examples/make_notebook.py"
    monkeypatch.chdir(ROOT / "examples")
    names: dict[str, object] = {}
    for cell, source in zip(cells, sources, strict=True):
        if cell["cell_type"] == "code":
            assert cell["outputs"], "run python examples/make_notebook.py"
            assert {output["output_type"] for output in cell["outputs"]} <= {"execute_result", "stream"}
            exec(compile(source, cell["id"], "exec"), names)
    assert isinstance(names["best"].image, Image.Image)
