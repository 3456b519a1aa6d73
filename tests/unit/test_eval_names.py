"""Names that become folders of a run."""

from __future__ import annotations

import json

import pytest

from fastface_cli import cli
from fastface_cli.evaluation import setup
from fastface_cli.evaluation.dataset import LONGEST, names_a_folder

BAD = ["", ".", "..", " ", "a\0b", "a/b", "a\\b", "/", "a\nb", "a\x1b[31m", "x" * 300, "é" * 60, "a."]


@pytest.mark.parametrize("name", BAD)
def test_recipe_name_that_is_no_folder_is_refused_before_models_load(name, tmp_path, monkeypatch, capfd):
    def load(*_, **__):
        raise AssertionError("models are loaded")

    for loads in ("check_machine", "scoring", "people"):
        monkeypatch.setattr(setup, loads, load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "ann.png").write_bytes(b"not decoded")
    (tmp_path / "photos" / "prompts.txt").write_text("a person\n")
    (tmp_path / "named.yaml").write_text(f"extends: pocket\nname: {json.dumps(name)}\n")
    assert cli.run(["eval", "-r", "named.yaml", "--dataset", "photos", "-o", "run"]) == 2
    error = capfd.readouterr().err
    assert "is not a valid folder name" in " ".join(error.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["pocket", "a b", "ünï", "x" * LONGEST])
def test_usual_names_are_valid(name):
    assert names_a_folder(name)
