"""Every example in a help text is run, from a folder that holds what it names, and does what it says.

What needs a GPU or gigabytes runs on the pocket stack: `STANDS_IN` says what stands in for what.
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
    # These do as they say with the full-size recipes; the others would fetch or compute for hours.
    "recipes": {},
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
    "cache remove": ["--yes"],  # nobody can be asked here
    "doctor": ["--offline"],
    "eval --": ["--metrics", "id"],
    "eval score theirs/": ["--face", "pocket", "--metrics", "id"],
}
"""Flags that make it short, or answer for the user."""
MADE = {
    "out/": "out/*.png",
    "image.png": "image.png",
    "run/": "run/report.html",
    "results/": "results/bench.md",
}
"""What must lie there afterwards, by what an example gives to -o."""


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each command that does something, and its help text."""
    below = getattr(command, "commands", {})
    if not below or getattr(command, "invoke_without_command", False):
        yield path, command.help or ""
    for name, each in below.items():
        yield from commands(each, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(cli.app)))
EXAMPLES = [
    found[0].strip()
    for text in COMMANDS.values()
    for found in re.finditer(r"(?m)(?<=^Example: )fastface .*$|^ +fastface .*$", text)
]


@pytest.mark.parametrize("path", [path for path in COMMANDS if path], ids=" ".join)
def test_every_command_has_an_example(path: tuple[str, ...]) -> None:
    assert f"fastface {' '.join(path)} " in COMMANDS[path] + " "


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a user: a photo, a small data set, a run of it whole and in two shards, and an image."""
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
    patch.setenv("FASTFACE_RECIPE", "pocket")  # where an example names none
    patch.setenv("FASTFACE_HOME", str(folder / "home"))
    patch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("example", EXAMPLES)
def test_runs(
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
    assert cli.run([*words, *more]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out
    if target is not None:
        assert list(folder.glob(MADE[target]))
