"""What an impatient user does wrong ends in one sentence, with the right exit code and never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PORTRAIT = Path(__file__).parents[2] / "examples" / "portrait.png"
FASTFACE = [sys.executable, "-c", "from fastface_cli.cli import main; main()"]


def unprivileged() -> list[str]:
    """What runs a command such that permissions bind it: nothing, or for root a way to drop its powers."""
    if os.geteuid() != 0:
        return []
    tool = shutil.which("setpriv")
    if tool is None:
        pytest.skip("root may do everything, and setpriv is not here")
    return [tool, "--bounding-set=-all", "--inh-caps=-all"]


def call(
    folder: Path, *arguments: str, bound: bool = False, stdin: int | None = subprocess.DEVNULL, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder; `bound` by permissions whoever runs the tests; stdin None: closed."""
    command = [*(unprivileged() if bound else []), *FASTFACE, *arguments]
    if stdin is None:
        command = ["sh", "-c", 'exec "$@" <&-', "sh", *command]
    environment = {"FASTFACE_HOME": str(folder / "home"), **env}
    done = subprocess.run(
        command,
        cwd=folder,
        stdin=stdin,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert "Traceback" not in done.stderr
    return done


def refused(done: subprocess.CompletedProcess[str], code: int, told: str) -> None:
    """One sentence that tells what is wrong, a blank line, and a hint."""
    assert done.returncode == code, done.stderr
    sentence, blank, hint = done.stderr.rstrip("\n").split("\n")[-3:]
    assert sentence.startswith("error: ")
    assert told in sentence
    assert "unexpected" not in sentence
    assert blank == ""
    assert hint.startswith("hint: ")


@pytest.fixture
def locked(tmp_path: Path):
    """A folder that may not be entered, `locked`, with a photo and a recipe in it."""
    folder = tmp_path / "locked"
    folder.mkdir()
    shutil.copy(PORTRAIT, tmp_path / "me.png")
    shutil.copy(PORTRAIT, folder / "me.png")
    (folder / "x.yaml").write_text("extends: pocket-fastface\n")
    folder.chmod(0)
    yield folder
    folder.chmod(0o700)


MAKE = ("generate", "--recipe", "pocket", "--prompt", "a")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ((*MAKE, "--face", "locked/me.png"), 2, "cannot read the photo locked/me.png: Permission denied"),
        ((*MAKE, "--face", "me.png", "-o", "locked/"), 2, "no permission to write to locked"),
        ((*MAKE, "--face", "me.png", "--stack", "locked/in"), 2, "no permission to use locked/in"),
        (
            (*MAKE, "--face", "me.png", "--set", "model.adapter=locked/x.bin"),
            3,
            "cannot read locked/x.bin: Permission denied",
        ),
        (("recipes", "validate", "locked/x.yaml"), 2, "cannot read the recipe file locked/x.yaml"),
        (
            ("eval", "--recipe", "pocket", "--dataset", "locked/in", "-o", "run"),
            2,
            "no permission to use locked/in",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_folder_that_may_not_be_entered(
    tmp_path: Path, locked: Path, arguments: tuple[str, ...], code: int, told: str
) -> None:
    refused(call(tmp_path, *arguments, bound=True), code, told)


def test_a_home_that_may_not_be_entered(tmp_path: Path, locked: Path) -> None:
    home = {"FASTFACE_HOME": "locked/home"}
    refused(call(tmp_path, "cache", "list", bound=True, **home), 2, "no permission to use locked/home")
    refused(
        call(tmp_path, "download", "taesdxl", bound=True, HF_HUB_OFFLINE="0", **home),
        3,
        "cannot store models in locked/home",
    )


@pytest.mark.parametrize("mode", [0o000, 0o555], ids=["closed", "read-only"])
@pytest.mark.parametrize("recipe", ["pocket", "hyper-fastface"])
def test_doctor_of_a_home_without_permission(tmp_path: Path, recipe: str, mode: int) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    kept.chmod(mode)
    done = call(
        tmp_path,
        *("doctor", "--recipe", recipe, "--offline", "--json"),
        bound=True,
        FASTFACE_HOME=str(kept / "home"),
    )
    kept.chmod(0o700)
    findings = {one["check"]: one for one in json.loads(done.stdout)["findings"]}
    assert findings["Cache"]["level"] == ("warning" if recipe == "pocket" else "failure")
    assert findings["Cache"]["message"] == f"{kept / 'home'} cannot be written: Permission denied"
    assert findings["Cache"]["mend"] == "export FASTFACE_HOME=~/fastface"


def test_a_home_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("in the way")
    done = call(tmp_path, "download", "taesdxl", HF_HUB_OFFLINE="0")
    refused(done, 3, f"cannot store models in {tmp_path / 'home'}: Not a directory")


def test_closed_stdin(tmp_path: Path) -> None:
    shutil.copy(PORTRAIT, tmp_path / "me.png")
    jobs = ("generate", "--recipe", "pocket", "--face", "me.png", "--jobs")
    refused(call(tmp_path, *jobs, "-", stdin=None), 2, "cannot read jobs from stdin: it is closed")
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a", "seed": 1, "output": "x.png"}\n')
    done = call(tmp_path, *jobs, "jobs.jsonl", stdin=None)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("json_", [[], ["--json"]], ids=["table", "json"])
def test_no_room_for_what_is_printed(tmp_path: Path, json_: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*FASTFACE, "recipes", "list", *json_],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "unexpected" not in done.stderr


@pytest.mark.parametrize(
    ("name", "encoding", "printed"),
    [
        (b"\xff.png", "utf-8", b"\xff.png\n"),
        ("\u6f22.png".encode(), "utf-8", "\u6f22.png\n".encode()),
        ("\u6f22.png".encode(), "latin-1", b"\\u6f22.png\n"),
    ],
    ids=["no text", "text", "letters that the terminal lacks"],
)
def test_names_that_cannot_be_printed(tmp_path: Path, name: bytes, encoding: str, printed: bytes) -> None:
    shutil.copy(PORTRAIT, tmp_path / "me.png")
    arguments = [*MAKE, "--face", "me.png", "--seed", "1", "-o", os.fsdecode(name)]
    done = subprocess.run(
        [*FASTFACE, *arguments],
        cwd=tmp_path,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding, "FASTFACE_HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / os.fsdecode(name)).exists()
    assert done.stdout == printed


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a file without end")
def test_a_prompts_file_without_end(tmp_path: Path) -> None:
    shutil.copy(PORTRAIT, tmp_path / "me.png")
    arguments = ("generate", "--recipe", "pocket", "--face", "me.png", "--prompts-file", "/dev/zero")
    refused(call(tmp_path, *arguments), 2, "the prompts file /dev/zero is larger than 64 MB")


def test_a_run_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    dataset = PORTRAIT.parent / "mini"
    done = call(tmp_path, *("eval", "--recipe", "pocket", "--dataset", str(dataset), "-o", "notes.txt"))
    refused(done, 2, "notes.txt is not a folder")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_face_runtime_keeps_and_tells_nothing(tmp_path: Path) -> None:
    """ONNX Runtime writes a number for the machine into the home folder where it may report to its maker."""
    home = tmp_path / "user"
    home.mkdir()
    outside = {name: "" for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")}
    done = call(tmp_path, "doctor", "--recipe", "pocket", "--offline", HOME=str(home), **outside)
    assert done.returncode == 0, done.stderr
    assert "face runs on CPU" in done.stdout
    assert list(home.rglob("*")) == []
