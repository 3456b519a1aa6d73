"""`fastface generate --jobs` as a user meets it, on a random miniature of the stack."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

LINES = """\
# a comment, and an empty line

{"prompt": "first", "seed": 1, "output": "{seed}.png", "set": {"model.base": "/nowhere/at/all"}}
{"prompt": "one", "seed": 1, "output": "{seed}.png"}
{"prompt": "two", "seed": 2, "output": "{seed}.png", "adapter_scale": 0.3, "set": ["sampling.steps=2"]}
{"prompt": "three", "seed": 3, "output": "{seed}.png", "set": {"guidance.text": [1, 2, 2, 1]}, \
"identity": "SOMEBODY"}
{"prompt": "again", "seed": 4, "output": "1.png"}
{"promt": "slip"}
not JSON
{"seed": 5}
{"prompt": "x", "seed": 6, "set": {"guidance.txt": 1}}
{"prompt": "x", "seed": 7, "set": {"adapter.lora_scale": 0.1}}
{"prompt": "x", "seed": 8, "face": "missing.jpg"}
{"prompt": "x", "seed": 9, "output": "9.png", "set": {"guidance.text": 1e30}}
{"prompt": "ten \\u2728", "seed": 10, "output": "sub/"}
"""

MADE = {4: ("1.png", "one", 1, 0.8, 10), 5: ("2.png", "two", 2, 0.3, 4), 6: ("3.png", "three", 3, 0.8, 10)}
FAILED = {
    3: (3, "/nowhere/at/all does not exist"),
    7: (2, "1.png already exists"),
    8: (2, "'promt' is not a field of a job"),
    9: (2, "is not valid JSON"),
    10: (2, "there is no prompt"),
    11: (2, "guidance.txt: unknown key"),
    12: (2, "adapter.lora_scale differs"),
    13: (2, "there is no photo missing.jpg"),
    14: (1, "not finite"),
}


@pytest.fixture(scope="module")
def done(stack, me, somebody, tmp_path_factory):
    """Every kind of line in one file: where it ran, exit code, records, and what went to stderr."""
    from contextlib import redirect_stderr, redirect_stdout

    from fastface_cli import cli

    folder = tmp_path_factory.mktemp("jobs")
    (folder / "jobs.jsonl").write_text(LINES.replace("SOMEBODY", str(somebody)))
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        code = cli.run(["generate", *stack, "--identity", str(me), "--jobs", "jobs.jsonl"])
    return (
        folder,
        code,
        {row["line"]: row for row in map(json.loads, out.getvalue().splitlines())},
        err.getvalue(),
    )


def test_each_line_has_its_record_in_order(done):
    _, code, records, err = done
    assert code == 1
    assert list(records) == list(range(3, 16))
    assert all(record["schema"] == 1 for record in records.values())
    assert err == "9 lines failed\n"


@pytest.mark.parametrize("line", MADE)
def test_each_line_generates_its_image(done, line):
    folder, _, records, _ = done
    keys = ("path", "prompt", "seed", "adapter_scale", "unet_samples")
    assert (records[line]["ok"], records[line]["error"]) == (True, None)
    assert tuple(records[line][key] for key in keys) == MADE[line]
    assert (folder / MADE[line][0]).is_file()


@pytest.mark.parametrize("line", FAILED)
def test_a_wrong_line_spoils_itself_alone(done, line):
    _, _, records, _ = done
    code, message = FAILED[line]
    assert records[line]["ok"] is False
    assert records[line]["error"]["code"] == code
    assert message in records[line]["error"]["message"]


def test_no_other_files_remain(done):
    folder, _, records, _ = done
    assert records[15]["path"] == "sub/hyper-fastface-10.png"
    actual = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert actual == ["1.png", "2.png", "3.png", "jobs.jsonl", "sub/hyper-fastface-10.png"]


def test_line_gives_the_same_image_as_a_single_call(done, generate, stack, somebody, tmp_path):
    """Also after lines with other steps, guidance, scale and person."""
    folder, *_ = done
    alone = tmp_path / "3.png"
    ended = generate(*stack, "--identity", somebody, "--prompt", "three", "--seed", 3, "-o", alone,
                     "--set", "guidance.text=[1,2,2,1]")  # fmt: skip
    assert ended.code == 0
    assert alone.read_bytes() == (folder / "3.png").read_bytes()


def test_jobs_from_stdin_take_the_flags_as_defaults(generate, stack, me, tmp_path, monkeypatch):
    lines = io.TextIOWrapper(io.BytesIO(b'{"prompt": "a"}\n{}\n'))
    monkeypatch.setattr(sys, "stdin", lines)
    ended = generate(
        *stack, "--identity", me, "--jobs", "-", "--prompt", "b", "--seed", 7, "--steps", 1,
        "--adapter-scale", 0.1, "-o", f"{tmp_path}/", "--no-metadata",
    )  # fmt: skip
    records = [json.loads(line) for line in ended.out.splitlines()]
    assert (ended.code, ended.err) == (0, "")
    assert [(row["prompt"], row["seed"], row["adapter_scale"]) for row in records] == [
        ("a", 7, 0.1),
        ("b", 7, 0.1),
    ]
    assert len({row["path"] for row in records}) == 2


def test_missing_models_end_the_run(generate, me, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFACE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    ended = generate("--identity", me, "--device", "cpu", "--offline", "--jobs", jobs, "--json")
    assert ended.code == 3
    assert ended.json["error"]["kind"] == "models"
    ended = generate("--identity", me, "--dtype", "int8", "--device", "cpu", "--jobs", jobs)
    assert ended.code == 1
    assert "dtype 'int8'" in ended.out


@pytest.mark.parametrize(
    "flags",
    [
        ["--grid"],
        ["--count", "2"],
        ["--save-latents", "x"],
        ["--save-identity", "x"],
        ["--prompts-file", "x"],
        ["--from", "x.png"],
        ["--adapter-scale", "0.1,0.2"],
        ["--prompt", "a", "--prompt", "b"],
    ],
)
def test_flags_that_one_line_cannot_follow(flags, generate, tmp_path):
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text('{"prompt": "a"}\n')
    ended = generate("--jobs", jobs, *flags)
    assert (ended.code, ended.out) == (2, "")
    assert "does not go with --jobs" in ended.err


@pytest.mark.parametrize("source", ["missing.jsonl", "."])
def test_a_file_that_cannot_be_read(source, generate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = generate("--jobs", Path(source), "--json")
    assert ended.code == 2
    assert "cannot read the jobs file" in ended.json["error"]["message"]


def test_a_photo_replaced_between_two_lines_is_the_new_person(tmp_path):
    """A web service writes each upload to the same file."""
    people = Path(__file__).parents[2] / "examples" / "mini" / "id_photos"
    photo = tmp_path / "upload.png"
    command = [sys.executable, "-c", "from fastface_cli.cli import main; main()"]
    arguments = ["generate", "--recipe", "pocket", "--jobs", "-", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdin is not None
    assert process.stdout is not None
    identities = []
    for number, name in enumerate(("anna", "hugo", "anna")):
        photo.write_bytes((people / f"{name}.png").read_bytes())
        job = {"face": "upload.png", "prompt": "a person", "seed": 1, "output": f"{number}.png"}
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        record = json.loads(process.stdout.readline())
        assert record["ok"], record
        with Image.open(tmp_path / f"{number}.png") as image:
            identities.append(json.loads(image.info["fastface"])["identity"])
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    assert identities[0] == identities[2] != identities[1]
