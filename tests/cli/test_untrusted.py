"""Names and metadata of other people on a terminal, repositories that an image names, and signals."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from fastface_cli import cli, console
from fastface_cli.output.images import write_image
from fastface_cli.output.metadata import Provenance, describe
from fastface_cli.recipe.files import load_recipe

PORTRAIT = Path(__file__).parents[2] / "examples" / "portrait.png"
COMMAND = [sys.executable, "-c", "from fastface_cli.cli import main; main()"]
OSC52 = "\x1b]52;c;cm0gLXJmIH4=\x07"
HOSTILE = [OSC52, "\x1b[2J", "\x9b31m", "\x7f", "\r", "\u202egnp.exe", "\x1bP+q\x1b\\"]


def on_a_terminal(arguments: list[str | os.PathLike[str]], folder: Path) -> str:
    """What a command writes to a terminal."""
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "FASTFACE_HOME": str(folder / "home")}
    process = subprocess.Popen([*COMMAND, *arguments], stdout=slave, stderr=slave, cwd=folder, env=env)
    os.close(slave)
    chunks = []
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:
            break
        if not chunk:
            break
        chunks.append(chunk)
    process.wait()
    os.close(master)
    return b"".join(chunks).decode("utf-8", "replace")


def dangerous(output: str) -> list[str]:
    """Sequences other than the colors, cursor movements and line ends that Rich writes itself."""
    own = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r?\n|\r", "", output)
    return re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", own) + re.findall(r"\x1b\[2J", output)


def test_terminal_escapes_in_names_and_prompts_are_shown_as_text(tmp_path):
    text = "".join(HOSTILE)
    name = f"x{text.replace('/', '')}.yaml"
    (tmp_path / name).write_text("a: [")
    assert dangerous(on_a_terminal(["recipes", "validate", name], tmp_path)) == []
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"extends: pocket\nsummary: {json.dumps('s' + text)}\nmodel: {json.dumps(text)}\n")
    assert dangerous(on_a_terminal(["recipes", "validate", recipe], tmp_path)) == []
    arguments = ["generate", "--recipe", "pocket", "--face", PORTRAIT, "--best-of", "2", "--seed", "1"]
    output = on_a_terminal([*arguments, "-p", f"a {text} woman"], tmp_path)
    assert dangerous(output) == []
    assert "best of 2" in output


def replayable(path: Path, **changes) -> Path:
    """An image whose metadata another person wrote."""
    provenance = Provenance(
        recipe=load_recipe("pocket").recipe,
        prompt="a woman",
        negative_prompt=None,
        seed=1,
        adapter_scale=0.8,
        identity_digest="0" * 16,
        unet_samples=4,
        versions={},
    )
    text = describe(provenance.model_copy(update=changes))
    return write_image(Image.new("RGB", (8, 8)), path, text=text)


def test_unknown_optimizations_of_an_image_are_not_printed(tmp_path):
    path = replayable(tmp_path / "x.png", lossy={OSC52: "y", "fp8": True})
    output = on_a_terminal(["generate", "--from", path, "--face", PORTRAIT], tmp_path)
    assert dangerous(output) == []
    assert "--accelerate fp8=on" in output
    assert "u001b" not in output


def test_escapes_keep_json_valid():
    text = json.dumps({"path": "".join(HOSTILE)}, ensure_ascii=False)
    assert json.loads(console.safe(text)) == json.loads(text)


def test_a_pipe_gets_names_exactly_as_they_are(capsys):
    console.line("x\x1b.png")
    assert capsys.readouterr().out == "x\x1b.png\n"


@pytest.fixture
def foreign(tmp_path):
    """An image that was made with a repository that nobody here knows."""
    recipe = load_recipe("pocket").recipe
    model = recipe.model.model_copy(update={"vae": f"hub:someone/else@{'1' * 40}"})
    return replayable(tmp_path / "x.png", recipe=recipe.model_copy(update={"model": model}))


def test_a_repository_that_only_an_image_names_is_not_downloaded(foreign, tmp_path, capsys):
    arguments = ["generate", "--from", str(foreign), "--face", str(PORTRAIT), "-o", str(tmp_path / "y.png")]
    assert cli.run([*arguments, "--offline"]) == 2
    error = capsys.readouterr().err
    assert "someone/else" in error
    assert "--allow-hub" in error


@pytest.mark.parametrize("flags", [["--allow-hub"], ["--set", f"model.vae=hub:someone/else@{'1' * 40}"]])
def test_a_repository_can_be_allowed_or_named(foreign, tmp_path, capsys, flags):
    arguments = ["generate", "--from", str(foreign), "--face", str(PORTRAIT), "-o", str(tmp_path / "y.png")]
    assert cli.run([*arguments, "--offline", *flags]) == 3  # allowed, but not downloaded yet
    assert "someone/else" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_in_json_with_the_finished_images(tmp_path, number, code):
    arguments = ["generate", "--recipe", "pocket", "--face", PORTRAIT, "-p", "a", "--count", "2000", "--json"]
    process = subprocess.Popen(
        [*COMMAND, *arguments, "-o", f"{tmp_path}/"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(1200):
        if len(list(tmp_path.glob("*.png"))) > 2:
            break
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    ended = json.loads(out)
    assert ended["error"] == {"kind": "interrupted", "code": code, "message": "interrupted", "hint": None}
    assert len(ended["images"]) == len(list(tmp_path.glob("*.png"))) > 2


def deep_override() -> str:
    return ".".join(["a"] * 5000) + "=1"


@pytest.mark.parametrize(
    "value", [deep_override(), "guidance.text=" + "[" * 5000, "guidance.text=" + "[" * 300 + "]" * 300]
)
def test_deeply_nested_overrides_are_reported(value, capsys):
    assert cli.run(["recipes", "show", "pocket", "--resolved", "--set", value]) == 2
    assert "nested too deeply" in capsys.readouterr().err


def test_long_numbers_in_recipes_take_no_time(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text("summary: " + "1" * 60_000 + "x\n")
    began = time.perf_counter()
    assert cli.run(["recipes", "validate", str(path)]) == 2
    assert time.perf_counter() - began < 5
    assert "is longer than" in capsys.readouterr().err
