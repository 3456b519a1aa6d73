"""Read a finished run: rows with scores, and the summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import UsageError
from .rows import Row
from .runs import read_info, read_lines


def read_rows(run: Path) -> list[Row]:
    """Return every image of a finished run with its scores.

    Raises:
        UsageError: there is no run, or it is unfinished.
    """
    path = run / "images.jsonl"
    if not path.is_file():
        raise _unfinished(run, path)
    try:
        return [Row.from_json(record) for _, record in read_lines(path)]
    except ValidationError as error:
        raise UsageError(f"{path} is damaged", f"fastface eval report {run}") from error


def read_summary(run: Path) -> dict[str, Any]:
    """Return the contents of `summary.json`.

    Raises:
        UsageError: there is no run, or it is unfinished.
    """
    path = run / "summary.json"
    if not path.is_file():
        raise _unfinished(run, path)
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}", f"fastface eval report {run}") from error
    return summary


def _unfinished(run: Path, path: Path) -> UsageError:
    read_info(run)  # raises if there is no run at all
    return UsageError(f"{run} is not finished: it has no {path.name}", f"fastface eval report {run}")
