"""What licenses allow: `fastface licenses`, `--commercial`, and the docs that tell it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastface_cli.app.licensing import artifacts_of, check_commercial
from fastface_cli.cli import run
from fastface_cli.errors import LicenseError
from fastface_cli.recipe.files import load_recipe, recipe_names
from fastface_cli.store.manifest import load_manifest

Capture = pytest.CaptureFixture[str]
DOCS = Path(__file__).parents[2] / "docs" / "licenses.md"


def asked(capsys: Capture, *arguments: str) -> dict:
    capsys.readouterr()
    assert run(["licenses", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_default_recipe_is_not_for_commerce(capsys: Capture) -> None:
    told = asked(capsys)
    assert told["recipe"] == "hyper-fastface"
    assert told["commercial"] == "no"
    uses = {part["role"]: part["commercial"] for part in told["parts"]}
    assert uses["adapter"] == uses["face"] == "no"
    assert uses["distillation"] == "unclear"
    assert uses["base"] == uses["vae"] == "yes"


def test_the_pocket_is_free(capsys: Capture) -> None:
    assert asked(capsys, "--recipe", "pocket")["commercial"] == "yes"


def test_the_step_count_chooses_the_checkpoint(capsys: Capture) -> None:
    told = asked(capsys, "--recipe", "lightning-fastface", "--steps", "2")
    assert "sdxl-lightning-2-step-unet" in {part["name"] for part in told["parts"]}


def test_the_table(capsys: Capture) -> None:
    assert run(["licenses", "--recipe", "turbo-fastface"]) == 0
    told = capsys.readouterr().out
    row = next(line for line in told.splitlines() if "sdxl-turbo-unet" in line)
    assert "Stability AI non-commercial community" in row
    assert "no: commercial use needs a Stability AI membership" in row
    assert "https://huggingface.co/stabilityai/sdxl-turbo/blob/main/LICENSE.md" in told.splitlines()
    assert told.splitlines()[-1] == "commercial use of turbo-fastface as a whole: no"


def test_generate_refuses_and_names_the_parts(tmp_path: Path, capsys: Capture) -> None:
    command = ["generate", "--commercial", "--prompt", "a", "--face", str(tmp_path / "me.jpg"), "--json"]
    assert run(command) == 2  # before the device, the photo and the models are looked at
    told = capsys.readouterr()
    error = json.loads(told.out)["error"]
    assert error["kind"] == "licence"
    assert "ip-adapter-faceid-plusv2-sdxl (non-commercial research)" in error["message"]
    assert "buffalo_l (InsightFace models)" in error["message"]
    assert "commercial use of hyper-sdxl-4-step-lora is unclear" in told.err


def test_generate_makes_what_is_free(tmp_path: Path, me: Path, capsys: Capture) -> None:
    made = tmp_path / "x.png"
    command = ["generate", "--identity", str(me), "--prompt", "a", "-o", str(made), "--commercial"]
    assert run([*command, "--recipe", "pocket"]) == 0
    assert made.exists()


def test_a_line_of_a_jobs_file_cannot_go_round_it(tmp_path: Path, me: Path, capsys: Capture) -> None:
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text(json.dumps({"prompt": "a", "set": ["model.adapter=ip-adapter-faceid-plusv2-sdxl"]}))
    command = ["generate", "--identity", str(me), "--jobs", str(jobs), "--recipe", "pocket", "--commercial"]
    assert run(command) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert "may not be used commercially" in json.loads(line)["error"]["message"]


def test_what_is_unknown_is_told_and_not_refused(caplog) -> None:
    recipe = load_recipe("pocket", overrides=["model.adapter=./mine.safetensors"]).recipe
    check_commercial(artifacts_of(recipe).values(), "recipe 'mine'")
    assert caplog.messages == ["commercial use of ./mine.safetensors is unclear: its license is not known"]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_judged_by_its_strictest_part(name: str) -> None:
    parts = artifacts_of(load_recipe(name).recipe).values()
    if any(part.commercial == "no" for part in parts):
        with pytest.raises(LicenseError):
            check_commercial(parts, name)
    else:
        assert name.startswith("pocket")


def test_the_docs_tell_of_every_model() -> None:
    told = DOCS.read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(): line for line in told.splitlines() if line.startswith("| `")}
    for artifact in load_manifest().values():
        row = rows[f"`{artifact.name}`"]
        assert artifact.license in row
        assert f"| {artifact.commercial}" in row
        assert artifact.license_link in row
