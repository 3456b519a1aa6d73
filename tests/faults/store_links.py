"""Symbolic links in the cache that lead to files of the user: the files stay as they are."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.hub_server import hub_server
from support.link_cases import CASES, changed
from support.tiny_manifest import Shop, fill, use_hub


def run() -> list[tuple[str, int, int]]:
    """Run every case; returns (what, passed, of)."""
    passed = 0
    for case in CASES:
        with (
            tempfile.TemporaryDirectory() as work,
            pytest.MonkeyPatch.context() as patch,
            hub_server() as hub,
        ):
            fill(hub)
            use_hub(patch, hub, Path(work) / "home")
            passed += changed(Shop(hub, Path(work) / "home"), case, Path(work) / "outside") is None
    return [("links to files outside the cache: the files are unchanged", passed, len(CASES))]
