"""What the documentation says of the command line is what the command line says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "docs" / "render_cli.py"


def test_the_page_of_help_texts_is_up_to_date() -> None:
    specification = importlib.util.spec_from_file_location("render_cli", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.render(), "run python docs/render_cli.py"
