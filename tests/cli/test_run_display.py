"""The display of a run without a terminal: a line at an interval, with the current stage."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from fastface_cli.app.events import IdentityReady, ModelsReady, RunStarted
from fastface_cli.app.request import GenerateRequest
from fastface_cli.app.runtime import Runtime
from fastface_cli.commands.generate import show_run
from fastface_cli.commands.run_display import RunDisplay
from fastface_cli.models.acceleration import Acceleration
from fastface_cli.recipe.files import load_recipe


def test_without_a_terminal_the_stage_is_printed_at_an_interval(capsys):
    with RunDisplay(interval=0.05) as display:
        display.working("loading models")
        time.sleep(0.2)
        display.steps(3, 8)
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("loading models (") for line in lines)
    assert lines[-1].startswith("3 of 8 steps (")
    assert lines[-1].endswith(" s)")


@pytest.mark.parametrize(("compiles", "last"), [(False, "generating"), (True, "compiling and generating")])
def test_stages_of_a_run(compiles, last, monkeypatch):
    stages: list[str] = []
    monkeypatch.setattr(RunDisplay, "working", lambda _, stage: stages.append(stage))
    recipe = load_recipe("pocket").recipe
    events = (RunStarted(recipe, (1,), 1), IdentityReady(None, True), ModelsReady(1, "cpu", "float32", ()))
    session = SimpleNamespace(
        runtime=Runtime(acceleration=Acceleration(compile=compiles)),
        settings=SimpleNamespace(verbosity=0),
        run=lambda _: (event for event in events),
    )
    show_run(session, GenerateRequest(prompts=("a",), seed=1), as_json=True, verbosity=0)
    assert stages == ["finding the face", "loading models", last]


def test_a_short_run_prints_nothing(capsys):
    with RunDisplay() as display:
        display.working("loading models")
    assert capsys.readouterr() == ("", "")
