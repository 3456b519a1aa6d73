"""The display of a run without a terminal: a line at an interval, with the current stage."""

from __future__ import annotations

import time

from fastface_cli.commands.run_display import RunDisplay


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


def test_a_short_run_prints_nothing(capsys):
    with RunDisplay() as display:
        display.working("loading models")
    assert capsys.readouterr() == ("", "")
