"""Wrong uses end with a one-sentence error, the documented exit code and no traceback."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastface_cli import cli
from fastface_cli.cli import main

PORTRAIT = Path(__file__).parents[2] / "examples" / "portrait.png"
FASTFACE = [sys.executable, "-c", "from fastface_cli.cli import main; main()"]


def unprivileged() -> list[str]:
    """Return a command prefix that makes permissions apply: for root, one that drops capabilities."""
    if os.geteuid() != 0:
        return []
    tool = shutil.which("setpriv")
    if tool is None:
        pytest.skip("root ignores permissions, and setpriv is not installed")
    return [tool, "--bounding-set=-all", "--inh-caps=-all"]


def call(
    folder: Path, *arguments: str, bound: bool = False, stdin: int | None = subprocess.DEVNULL, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder; `bound`: permissions apply even to root; stdin None: closed."""
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


def refused(done: subprocess.CompletedProcess[str], code: int, message: str) -> None:
    """Check the exit code, and that stderr ends with an error of one sentence, a blank line and a hint."""
    assert done.returncode == code, done.stderr
    sentence, blank, hint = done.stderr.rstrip("\n").split("\n")[-3:]
    assert sentence.startswith("error: ")
    assert message in sentence
    assert "unexpected" not in sentence
    assert blank == ""
    assert hint.startswith("hint: ")


@pytest.fixture
def locked(tmp_path: Path):
    """Create the inaccessible folder `locked` with a photo and a recipe."""
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
    ("arguments", "code", "message"),
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
def test_inaccessible_folder_is_a_clear_error(
    tmp_path: Path, locked: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    refused(call(tmp_path, *arguments, bound=True), code, message)


def test_inaccessible_home_is_a_clear_error(tmp_path: Path, locked: Path) -> None:
    home = {"FASTFACE_HOME": "locked/home"}
    refused(call(tmp_path, "cache", "list", bound=True, **home), 2, "no permission to use locked/home")
    refused(
        call(tmp_path, "download", "taesdxl", bound=True, HF_HUB_OFFLINE="0", **home),
        3,
        "cannot store models in locked/home",
    )


@pytest.mark.parametrize("mode", [0o000, 0o555], ids=["closed", "read-only"])
@pytest.mark.parametrize("recipe", ["pocket", "hyper-fastface"])
def test_doctor_reports_a_home_without_permission(tmp_path: Path, recipe: str, mode: int) -> None:
    closed = tmp_path / "kept"
    closed.mkdir()
    closed.chmod(mode)
    done = call(
        tmp_path,
        *("doctor", "--recipe", recipe, "--offline", "--json"),
        bound=True,
        FASTFACE_HOME=str(closed / "home"),
    )
    closed.chmod(0o700)
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert findings["Cache"]["level"] == ("warning" if recipe == "pocket" else "failure")
    assert findings["Cache"]["message"] == f"{closed / 'home'} cannot be written: Permission denied"
    assert findings["Cache"]["mend"] == "export FASTFACE_HOME=~/fastface"


def test_home_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("in the way")
    done = call(tmp_path, "download", "taesdxl", HF_HUB_OFFLINE="0")
    refused(done, 3, f"cannot store models in {tmp_path / 'home'}: Not a directory")


def test_jobs_with_closed_stdin(tmp_path: Path) -> None:
    shutil.copy(PORTRAIT, tmp_path / "me.png")
    jobs = ("generate", "--recipe", "pocket", "--face", "me.png", "--jobs")
    refused(call(tmp_path, *jobs, "-", stdin=None), 2, "cannot read jobs from stdin: it is closed")
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a", "seed": 1, "output": "x.png"}\n')
    done = call(tmp_path, *jobs, "jobs.jsonl", stdin=None)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="requires /dev/full")
@pytest.mark.parametrize("json_", [[], ["--json"]], ids=["table", "json"])
def test_full_stdout_fails_without_traceback(tmp_path: Path, json_: list[str]) -> None:
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
    ids=["not UTF-8", "UTF-8", "not encodable by the terminal"],
)
def test_file_names_that_cannot_be_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes, encoding: str, printed: bytes
) -> None:
    shutil.copy(PORTRAIT, tmp_path / "me.png")
    arguments = [*MAKE, "--face", "me.png", "--seed", "1", "-o", os.fsdecode(name)]
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTFACE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("DIFFUSERS_VERBOSITY", "error")
    monkeypatch.setattr(sys, "argv", ["fastface", *arguments])
    monkeypatch.setattr(sys, "stdout", stdout)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert ended.value.code == 0
    assert (tmp_path / os.fsdecode(name)).exists()
    stdout.flush()
    assert stdout.buffer.getvalue() == printed


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="requires /dev/zero")
def test_endless_prompts_file_is_refused(tmp_path: Path) -> None:
    shutil.copy(PORTRAIT, tmp_path / "me.png")
    arguments = ("generate", "--recipe", "pocket", "--face", "me.png", "--prompts-file", "/dev/zero")
    refused(call(tmp_path, *arguments), 2, "the prompts file /dev/zero is larger than 64 MB")


def test_eval_does_not_replace_a_file_by_a_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    dataset = PORTRAIT.parent / "mini"
    done = call(tmp_path, *("eval", "--recipe", "pocket", "--dataset", str(dataset), "-o", "notes.txt"))
    refused(done, 2, "notes.txt is not a folder")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_face_runtime_stores_and_sends_nothing(tmp_path: Path) -> None:
    """With telemetry enabled, ONNX Runtime writes a machine identifier to the home folder."""
    home = tmp_path / "user"
    home.mkdir()
    outside = {name: "" for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")}
    done = call(tmp_path, "doctor", "--recipe", "pocket", "--offline", HOME=str(home), **outside)
    assert done.returncode == 0, done.stderr
    assert "face runs on CPU" in done.stdout
    assert list(home.rglob("*")) == []


@pytest.mark.parametrize(
    ("arguments", "ending"),
    [
        (["download", "--recipe", "pocket"], "No such option: --recipe. Write the recipe without --recipe"),
        (["recipes", "show", "--recipe", "pocket"], "Write the recipe without --recipe"),
        (["bench", "pocket"], "extra argument(s) (pocket). Write --recipe before a recipe"),
        (["cache", "list", "pocket"], "extra argument(s) (pocket)"),
    ],
)
def test_arguments_of_another_command_are_explained(arguments, ending, capsys):
    assert cli.run(arguments) == 2
    assert capsys.readouterr().err.rstrip().endswith(ending)
