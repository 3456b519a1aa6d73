"""`fastface eval` as a user meets it, with the pocket on two people of the mini set."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastface_cli import cli

MINI = Path(__file__).parents[2] / "examples" / "mini"
COMMAND = [sys.executable, "-c", "from fastface_cli.cli import main; main()", "eval"]
RECIPES = ["--recipe", "pocket-fastface", "--recipe", "pocket-baseline"]
METRICS = ["--metrics", "id,clip-pocket,cost"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two people and two prompts."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "id_photos").mkdir()
    for name in ("anna", "joel"):
        shutil.copy(MINI / "id_photos" / f"{name}.png", folder / "id_photos")
    (folder / "prompts.txt").write_text("A person smiling\nwatercolor; a person\n")
    return folder


@pytest.fixture(scope="module")
def run(two, tmp_path_factory):
    """A run of them, by the command."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = subprocess.run(
        [*COMMAND, *RECIPES, "--dataset", two, *METRICS, "-o", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (folder.parent / "out.txt").write_text(done.stdout)
    (folder.parent / "err.txt").write_text(done.stderr)
    return folder


def rows(folder: Path) -> list[dict]:
    """Every image's row without its time, which is never the same."""
    found = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    for row in found:
        row.pop("seconds")
        row["scores"].pop("seconds", None)
    return found


def test_one_command_gives_table_summary_csv_and_page(run):
    out = (run.parent / "out.txt").read_text()
    assert "pocket-baseline" in out
    assert "95% interval" in out
    assert out.splitlines()[-1] == str(run / "report.html")
    said = "fewer than 8 identities say little about people in general; better are 50\n"
    assert (run.parent / "err.txt").read_text() == said
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["recipes"]) == ["pocket-fastface", "pocket-baseline"]
    assert list(summary["paired"]) == ["pocket-baseline"]
    assert summary["counts"]["pocket-baseline"] == {"images": 4, "failed": 0, "no_face": 0}
    assert summary["recipes"]["pocket-fastface"]["unet_samples"]["mean"] == 10
    assert summary["recipes"]["pocket-fastface"]["id"]["n"] == 4
    with (run / "images.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(line["key"], line["error"]) for line in table] == [(row["key"], "") for row in rows(run)]
    assert "<html" in (run / "report.html").read_text()


def test_the_run_says_what_it_is_of(run, two):
    info = json.loads((run / "run.json").read_text())
    assert info["dataset"]["identities"] == ["anna", "joel"]
    assert info["dataset"]["prompts"] == ["A person smiling", "watercolor; a person"]
    assert info["recipes"]["pocket-fastface"]["guidance"]["text"] == [1, 3, 3, 1]
    assert info["options"]["dtype"] == "float32"
    assert {"torch", "diffusers", "fastface"} <= info["versions"].keys()
    assert info["hardware"]["cores"] > 0
    assert all(info["local_models"]["pocket-baseline"].values())


def test_an_image_can_be_made_again_alone(run, two, tmp_path, capfd):
    """By its own metadata: the seed in it does not depend on what else was in the run."""
    from PIL import Image

    row = rows(run)[3]
    again = tmp_path / "again.png"
    code = cli.run(
        [
            "generate",
            "--from",
            str(run / row["file"]),
            "--face",
            str(run / row["reference"]),
            "-o",
            str(again),
        ]
    )
    assert code == 0
    assert "not the identity" not in capfd.readouterr().err
    assert Image.open(again).tobytes() == Image.open(run / row["file"]).tobytes()


def test_the_published_protocol_makes_pictures_as_its_data_set_was_made(tmp_path, capfd):
    arguments = [
        "eval",
        "-r",
        "pocket",
        "--dataset",
        str(MINI),
        "--protocol",
        "published",
        "--shard",
        "99/99",
    ]
    scales = []
    for name, more in (("a", []), ("b", ["--set", "adapter.lora_scale=0.5"])):
        cli.run([*arguments, *more, "-o", str(tmp_path / name)])
        known = json.loads((tmp_path / name / "run.json").read_text())
        scales.append(known["recipes"]["pocket-fastface"]["adapter"]["lora_scale"])
        assert known["dataset"]["prompts"] == [text.lower() for text in known["dataset"]["prompts"]]
    assert scales == [0.8, 0.5]
    assert "adapter.lora_scale is 0.8, as in the published data set" in capfd.readouterr().err


def test_scoring_later_adds_to_a_run(run, tmp_path, capfd):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "scores.jsonl").unlink()
    assert cli.run(["eval", "score", str(copy), "--metrics", "id", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["ok"], told["run"]) == (True, str(copy))
    wanted, found = rows(run), rows(copy)
    assert [row["scores"]["id"] for row in found] == [row["scores"]["id"] for row in wanted]
    assert cli.run(["eval", "report", str(copy)]) == 0
    assert rows(copy) == found


def test_pictures_of_another_program_score_as_in_the_run(run, two, tmp_path, capfd):
    """INDEX.png in the order of a file, as the published scripts leave them."""
    theirs, order = tmp_path / "theirs", ["joel", "anna"]
    theirs.mkdir()
    ours = {(row["identity"], row["prompt_index"]): row for row in rows(run) if "fastface/" in row["key"]}
    for index in range(4):
        row = ours[order[index // 2], index % 2]
        shutil.copy(run / row["file"], theirs / f"{index}.png")
    (tmp_path / "order.txt").write_text("\n".join(f"{name}.png" for name in order))
    command = ["eval", "score", theirs, "--dataset", two, "--identity-order", tmp_path / "order.txt"]
    command += ["--face", "pocket", "--metrics", "id", "-o", tmp_path / "scored"]
    assert cli.run([str(part) for part in command]) == 0, capfd.readouterr().err
    found = {(row["identity"], row["prompt_index"]): row["scores"]["id"] for row in rows(tmp_path / "scored")}
    assert found == pytest.approx({place: row["scores"]["id"] for place, row in ours.items()}, abs=1e-5)


def test_other_inputs_are_refused(run, two, capfd):
    before = (run / "generated.jsonl").read_bytes()
    code = cli.run(["eval", *RECIPES, "--dataset", str(two), *METRICS, "--seeds", "2", "-o", str(run)])
    assert code == 2
    said = capfd.readouterr().err
    assert "options.seeds: 1 then, 2 now" in said
    assert (run / "generated.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "eval needs --recipe, --dataset and -o"),
        (["--recipe", "pocket"], 2, "eval needs --recipe, --dataset and -o"),
        ([*RECIPES, "--dataset", "/nowhere", "-o", "run"], 2, "there is no data set /nowhere"),
        ([*RECIPES, "--dataset", str(MINI), "-o", "run", "--engine", "rai"], 2, "there is no engine 'rai'"),
        ([*RECIPES, "--dataset", str(MINI), "-o", "run", "--split", "x"], 2, "there is no split 'x'"),
        ([*RECIPES, "--dataset", str(MINI), "-o", "run", "--shard", "3/2"], 2, "--shard '3/2' is not"),
        ([*RECIPES, "--dataset", str(MINI), "-o", "run", "--stress", "fog"], 2, "there is no stress 'fog'"),
        ([*RECIPES, "--dataset", str(MINI), "-o", "run", "--metrics", "idd"], 2, "no metric called 'idd'"),
        ([*RECIPES, "--dataset", str(MINI), "-o", "run", "--protocol", "pub"], 2, "no protocol 'pub'"),
        ([*RECIPES, "--dataset", str(MINI), "-o", "run", "--device", "cuda:77"], 4, "no CUDA|no cuda:77"),
        (["-r", "pocket", "-r", "pocket", "--dataset", str(MINI), "-o", "run"], 2, "two recipes are called"),
        (["--recipe", "pocket", "--dataset", "diversefaces", "-o", "run"], 2, "has not been fetched"),
        (["score", "nowhere"], 2, "nowhere is not a run"),
        (["report", "nowhere"], 2, "there is no run in nowhere"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_made(arguments, code, said, tmp_path, monkeypatch, capfd):
    import re

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTFACE_HOME", str(tmp_path / "home"))
    assert cli.run(["eval", *arguments]) == code
    assert re.search(said, " ".join(capfd.readouterr().err.split()))
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------- slow


def command(two: Path, folder: Path, *more: str) -> list[str]:
    return [*COMMAND, *RECIPES, "--dataset", str(two), "--seeds", "4", *METRICS, "-o", str(folder), *more]


@pytest.fixture(scope="module")
def whole(two, tmp_path_factory):
    """32 images without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(command(two, folder), check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_killed_at_ten_random_moments_the_numbers_are_the_same(two, whole, tmp_path):
    chance, log = random.Random(11), tmp_path / "run" / "generated.jsonl"
    kills = []
    for _ in range(10):
        process = subprocess.Popen(command(two, tmp_path / "run"), stdout=subprocess.DEVNULL)
        made = lines(log)
        while process.poll() is None and lines(log) == made:
            time.sleep(0.01)
        assert process.poll() is None, "it came to its end before it was killed ten times"
        time.sleep(chance.uniform(0, 0.15))  # about a picture: ten kills come before the end
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills.append(lines(log))
    assert kills[-1] < 32
    before = kills[-1]
    subprocess.run(command(two, tmp_path / "run"), check=True, capture_output=True)
    assert lines(log) == 32 > before  # not one image was made twice
    assert rows(tmp_path / "run") == rows(whole)


def test_prompts_given_twice_are_named(two, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("one\ntwo\none\n")
    options = ["--recipe", "pocket", "--prompts", tmp_path / "prompts.txt", "--metrics", "unheard-of"]
    assert cli.run(["eval", "--dataset", str(two), *map(str, options), "-o", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "1 prompt is given more than once, as 'one': each time counts as a prompt of its own" in (
        " ".join(said.split())
    )


def lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


@pytest.mark.slow
def test_workers_make_the_numbers_of_one(two, whole, tmp_path):
    subprocess.run(command(two, tmp_path / "run", "--workers", "2"), check=True, capture_output=True)
    assert rows(tmp_path / "run") == rows(whole)


@pytest.mark.slow
def test_ray_makes_the_same_numbers_with_a_worker_killed(two, whole, tmp_path):
    pytest.importorskip("ray")
    import psutil

    log, said = tmp_path / "run" / "generated.jsonl", tmp_path / "said.txt"
    with said.open("w") as err:
        process = subprocess.Popen(
            command(two, tmp_path / "run", "--engine", "ray", "--workers", "2"),
            stdout=subprocess.DEVNULL,
            stderr=err,
        )
        while process.poll() is None and lines(log) < 6:
            time.sleep(0.05)
        assert process.poll() is None, said.read_text()
        actors = [
            one
            for one in psutil.Process(process.pid).children(recursive=True)
            if "_Actor" in one.name() or "ray::_Actor" in " ".join(one.cmdline())
        ]
        assert actors
        actors[0].kill()
        assert process.wait(300) == 0, said.read_text()
    assert "a worker was lost over" in said.read_text()
    assert rows(tmp_path / "run") == rows(whole)


@pytest.mark.slow
def test_shards_merged_are_the_whole(two, whole, tmp_path):
    folders = []
    for part in ("1/3", "2/3", "3/3"):  # a recipe each for two of them, and nothing for the last
        folders.append(tmp_path / part.replace("/", "of"))
        subprocess.run(command(two, folders[-1], "--shard", part), check=True, capture_output=True)
    assert cli.run(["eval", "merge", *map(str, folders), "-o", str(tmp_path / "run")]) == 0
    assert rows(tmp_path / "run") == rows(whole)
