"""`fastface generate --best-of` as a user meets it, on the pocket stack."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples" / "portrait.png"
POCKET = ["--recipe", "pocket-baseline", "--device", "cpu"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """The example's person as an identity file."""
    from fastface_cli import FastFace

    kept = tmp_path_factory.mktemp("drawn") / "drawn.safetensors"
    return FastFace("pocket", device="cpu").identity(EXAMPLE).save(kept)


def test_each_image_is_the_best_of_its_own_candidates(generate, drawn, tmp_path):
    flags = ["--identity", drawn, "-p", "a woman", "--seed", 5, "--count", 2, "--best-of", 3]
    ended = generate(*POCKET, *flags, "-o", f"{tmp_path}/out/", "--grid", "--json")
    assert ended.code == 0, ended.err
    images = ended.json["images"]
    assert len(images) == 2
    for first, image in zip((5, 8), images, strict=True):
        best = image["best_of"]
        assert [score["seed"] for score in best["candidates"]] == [first, first + 1, first + 2]
        assert best["count"] == 3
        assert image["seed"] in range(first, first + 3)
        kept = next(score for score in best["candidates"] if score["seed"] == image["seed"])
        assert (kept["likeness"], kept["prompt"]) == (best["likeness"], best["prompt"])
        assert image["path"].endswith(f"-{image['seed']}.png")
        with Image.open(image["path"]) as picture:
            stored = json.loads(picture.info["fastface"])
            assert "Best of: 3" in picture.info["parameters"]
        assert stored["seed"] == image["seed"]
        assert stored["best_of"]["first_seed"] == first
    # Two pictures and the sheet of all six candidates, in rows of three; nothing else is left behind.
    assert len(list((tmp_path / "out").iterdir())) == 3
    with Image.open(ended.json["grid"]) as sheet:
        assert 3 * 256 < sheet.width < 4 * 256
        assert 2 * 256 < sheet.height < 3 * 256


def test_scores_go_to_stderr_and_one_path_to_stdout_and_replay_makes_it_again(generate, drawn, tmp_path):
    path = tmp_path / "x.png"
    flags = ["--identity", drawn, "--device", "cpu"]
    ended = generate(*POCKET, "--identity", drawn, "-p", "a man", "--seed", 1, "--best-of", 2, "-o", path)
    assert (ended.code, ended.out) == (0, f"{path}\n")
    assert "best of 2: a man" in ended.err
    assert re.search(r"likeness by (dlib|the conditioning recognizer)", ended.err)
    assert ended.err.count("kept") == 1
    again = tmp_path / "y.png"
    assert generate("--from", path, *flags, "-o", again).code == 0
    with Image.open(path) as image, Image.open(again) as other:
        assert image.tobytes() == other.tobytes()


def test_a_line_of_a_jobs_file_has_its_own_number(generate, drawn, tmp_path):
    jobs = tmp_path / "jobs.jsonl"
    lines = [
        {"prompt": "a man", "seed": 1, "best_of": 2},
        {"prompt": "a man", "seed": 1},
        {"prompt": "a man", "best_of": 0},
    ]
    jobs.write_text("\n".join(json.dumps(line) for line in lines))
    ended = generate(*POCKET, "--identity", drawn, "--jobs", jobs, "-o", f"{tmp_path}/out/")
    assert ended.code == 1
    first, second, third = (json.loads(line) for line in ended.out.splitlines())
    assert len(first["best_of"]["candidates"]) == 2
    assert second["seed"] == 1
    assert "best_of" not in second
    assert third["error"]["code"] == 2


@pytest.mark.parametrize("number", ["0", "1001", "many"])
def test_numbers_that_make_no_sense(number, generate, drawn):
    ended = generate(*POCKET, "--identity", drawn, "-p", "a", "--best-of", number, "--json")
    assert ended.code == 2
    assert "--best-of" in ended.json["error"]["message"]


def test_candidates_beyond_the_last_seed(generate, drawn):
    ended = generate(*POCKET, "--identity", drawn, "-p", "a", "--seed", 2**63 - 2, "--best-of", 4, "--json")
    assert "out of range" in ended.json["error"]["message"]


def test_stack_without_a_matching_scorer_is_reported(
    generate, miniature, drawn, layout, tmp_path, monkeypatch
):
    """The random miniature with the pocket's faces: likeness is judged, the prompt is not."""
    import fastface_cli

    monkeypatch.setenv("FASTFACE_HOME", str(tmp_path / "home"))
    face = Path(fastface_cli.__file__).parent / "pocket" / "weights" / "face"
    flags = ["--stack", layout, "--set", f"model.face={face}", "--size", 64, "--steps", 1, "--device", "cpu"]
    path = tmp_path / "x.png"
    ended = generate(*flags, "--identity", drawn, "-p", "a", "--seed", 1, "--best-of", 2, "-o", path)
    assert (ended.code, ended.out) == (0, f"{path}\n")
    assert "prompts are not scored, because no CLIP model is installed" in ended.err
    assert "download clip-vit-large-patch14" in ended.err
