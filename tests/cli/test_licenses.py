"""Licenses: `fastface licenses`, `--commercial`, and their documentation."""

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


def licenses_of(capsys: Capture, *arguments: str) -> dict:
    capsys.readouterr()
    assert run(["licenses", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_default_recipe_is_non_commercial(capsys: Capture) -> None:
    report = licenses_of(capsys)
    assert report["recipe"] == "hyper-fastface"
    assert report["commercial"] == "no"
    uses = {part["role"]: part["commercial"] for part in report["parts"]}
    assert uses["adapter"] == uses["face"] == "no"
    assert uses["distillation"] == "unclear"
    assert uses["base"] == uses["vae"] == "yes"


def test_pocket_allows_commercial_use(capsys: Capture) -> None:
    assert licenses_of(capsys, "--recipe", "pocket")["commercial"] == "yes"


def test_step_count_selects_the_checkpoint(capsys: Capture) -> None:
    report = licenses_of(capsys, "--recipe", "lightning-fastface", "--steps", "2")
    assert "sdxl-lightning-2-step-unet" in {part["name"] for part in report["parts"]}


def test_table_lists_restrictions_and_links(capsys: Capture) -> None:
    assert run(["licenses", "--recipe", "turbo-fastface"]) == 0
    report = capsys.readouterr().out
    row = next(line for line in report.splitlines() if "sdxl-turbo-unet" in line)
    assert "Stability AI non-commercial community" in row
    assert "no: commercial use needs a Stability AI membership" in row
    assert "https://huggingface.co/stabilityai/sdxl-turbo/blob/main/LICENSE.md" in report.splitlines()
    assert report.splitlines()[-1] == "commercial use of turbo-fastface as a whole: no"


def test_generate_refuses_and_names_the_parts(tmp_path: Path, capsys: Capture) -> None:
    command = ["generate", "--commercial", "--prompt", "a", "--face", str(tmp_path / "me.jpg"), "--json"]
    assert run(command) == 2  # checked before the device, the photo and the models
    report = capsys.readouterr()
    error = json.loads(report.out)["error"]
    assert error["kind"] == "licence"
    assert "ip-adapter-faceid-plusv2-sdxl (non-commercial research)" in error["message"]
    assert "buffalo_l (InsightFace models)" in error["message"]
    assert "commercial use of hyper-sdxl-4-step-lora is unclear" in report.err


def test_generate_runs_with_a_commercial_license(tmp_path: Path, me: Path, capsys: Capture) -> None:
    image = tmp_path / "x.png"
    command = ["generate", "--identity", str(me), "--prompt", "a", "-o", str(image), "--commercial"]
    assert run([*command, "--recipe", "pocket"]) == 0
    assert image.exists()


def test_jobs_cannot_bypass_the_license_check(tmp_path: Path, me: Path, capsys: Capture) -> None:
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text(json.dumps({"prompt": "a", "set": ["model.adapter=ip-adapter-faceid-plusv2-sdxl"]}))
    command = ["generate", "--identity", str(me), "--jobs", str(jobs), "--recipe", "pocket", "--commercial"]
    assert run(command) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert "may not be used commercially" in json.loads(line)["error"]["message"]


def test_unknown_license_is_reported_but_not_refused(caplog) -> None:
    recipe = load_recipe("pocket", overrides=["model.adapter=./mine.safetensors"]).recipe
    check_commercial(artifacts_of(recipe).values(), "recipe 'mine'")
    assert caplog.messages == ["commercial use of ./mine.safetensors is unclear: its license is not known"]


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_has_the_use_of_its_strictest_part(name: str) -> None:
    parts = artifacts_of(load_recipe(name).recipe).values()
    if any(part.commercial == "no" for part in parts):
        with pytest.raises(LicenseError):
            check_commercial(parts, name)
    else:
        assert name.startswith("pocket") or "plusface" in name


def test_docs_list_every_model() -> None:
    report = DOCS.read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(): line for line in report.splitlines() if line.startswith("| `")}
    for artifact in load_manifest().values():
        row = rows[f"`{artifact.name}`"]
        assert artifact.license in row
        assert f"| {artifact.commercial}" in row
        assert artifact.license_link in row


def test_the_british_spelling_is_accepted(capsys):
    assert run(["licences", "--recipe", "pocket"]) == 0
    assert "pocket" in capsys.readouterr().out
