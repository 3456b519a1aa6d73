"""Every example of a help text runs, in a folder with the files that it names.

Examples that require a GPU or large downloads run on the pocket stack: see `STANDS_IN`.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from fastface_cli import cli
from fastface_cli.settings import load_settings
from fastface_cli.store import Store
from fastface_cli.store.manifest import load_manifest

ROOT = Path(__file__).parents[2]
STANDS_IN = {
    # These run with full-size recipes; the others would download or compute for hours.
    "recipes": {},
    "serve": {"hyper-fastface": "pocket"},
    "licenses": {},
    "download": {},
    "bench": {"hyper-fastface": "pocket-fastface", "random": "random-small"},
    "eval": {
        "hyper-fastface": "pocket-fastface",
        "hyper-baseline": "pocket-baseline",
        "diversefaces": "examples/mini",
        "image-reward": "clip-pocket",
    },
}
MORE = {
    "bench": ["--repeats", "2", "--no-cold"],
    "cache remove": ["--yes"],  # there is no terminal for a prompt
    "doctor": ["--offline"],
    "serve": ["--port", "0"],
    "eval --": ["--metrics", "id"],
    "eval score theirs/": ["--face", "pocket", "--metrics", "id"],
}
"""Flags that shorten a run or answer a prompt."""
MADE = {
    "out/": "out/*.png",
    "image.png": "image.png",
    "run/": "run/report.html",
    "results/": "results/bench.md",
}
"""Expected files by the value of -o."""


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield every leaf command and its help text."""
    below = getattr(command, "commands", {})
    if not below or getattr(command, "invoke_without_command", False):
        yield path, command.help or ""
    for name, each in below.items():
        if each.hidden:  # another spelling of a command
            continue
        yield from commands(each, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(cli.app)))
EXAMPLES = [
    match[0].strip()
    for text in COMMANDS.values()
    for match in re.finditer(r"(?m)(?<=^Example: )fastface .*$|^ +fastface .*$", text)
]


@pytest.mark.parametrize("path", [path for path in COMMANDS if path], ids=" ".join)
def test_every_command_has_an_example(path: tuple[str, ...]) -> None:
    assert f"fastface {' '.join(path)} " in COMMANDS[path] + " "


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a user folder: photo, image, small data set, its complete run, and the run in two shards."""
    folder = tmp_path_factory.mktemp("examples")
    with Image.open(ROOT / "examples" / "portrait.png") as portrait:
        portrait.convert("RGB").save(folder / "me.jpg", quality=95)
    photos = folder / "examples" / "mini" / "id_photos"
    photos.mkdir(parents=True)
    for name in ("anna", "joel"):
        shutil.copy(ROOT / "examples" / "mini" / "id_photos" / f"{name}.png", photos)
    for split in ("prompts", "prompts_style", "prompts_nostyle"):
        (photos.parent / f"{split}.txt").write_text("a smiling woman\n")
    with pytest.MonkeyPatch.context() as patch:
        at(folder, patch)
        eval_ = ["eval", "--recipe", "pocket-fastface", "--dataset", "examples/mini", "--metrics", "id"]
        for arguments in (
            ["generate", "--face", "me.jpg", "--prompt", "a", "-o", "image.png"],
            [*eval_, "-o", "run"],
            [*eval_, "--shard", "1/2", "-o", "shard1"],
            [*eval_, "--shard", "2/2", "-o", "shard2"],
        ):
            assert cli.run(arguments) == 0
    shutil.copytree(folder / "run", folder / "before")
    shutil.copytree(folder / "run", folder / "after")
    (folder / "theirs").mkdir()
    for index in range(2):
        shutil.copy(folder / "image.png", folder / "theirs" / f"{index}.png")
    (folder / "order.txt").write_text("anna.png\njoel.png\n")
    return folder


def at(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.chdir(folder)
    patch.setenv("FASTFACE_RECIPE", "pocket")  # the default of examples without a recipe
    patch.setenv("FASTFACE_HOME", str(folder / "home"))
    patch.setenv("HF_HUB_OFFLINE", "1")


def end_servers_at_once(patch: pytest.MonkeyPatch) -> None:
    async def main_loop(_: object) -> None:
        """Serve nothing."""

    patch.setattr("uvicorn.Server.main_loop", main_loop)
    patch.setattr("webbrowser.open", lambda _: True)


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(
    example: str,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "user"
    shutil.copytree(place, folder)
    at(folder, monkeypatch)
    words = shlex.split(example)[1:]
    words = [STANDS_IN.get(words[0], {}).get(word, word) for word in words]
    more = [
        flag for start, flags in MORE.items() if example.startswith(f"fastface {start}") for flag in flags
    ]
    target = words[words.index("-o") + 1] if "-o" in words else None
    if target == "run/":
        shutil.rmtree(folder / target)
    elif target == "image.png":
        (folder / target).unlink()
    for name in set(words) & set(load_manifest()) if words[:2] == ["cache", "remove"] else ():
        model = load_manifest()[name]
        file = Store(load_settings()).layout.place(model, model.files[0].path)
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes(8))
    if words[0] == "serve":
        end_servers_at_once(monkeypatch)
    assert cli.run([*words, *more]) == 0, capsys.readouterr().err
    output = capsys.readouterr()
    if words[0] == "serve":
        assert "serving " in output.err
        return
    assert output.out
    if target is not None:
        assert list(folder.glob(MADE[target]))
