"""Write `index.html`, a page that lists the runs of a folder with links to their reports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import write_atomically
from .finished import read_rows, read_summary
from .report import facts, link, opening, render
from .runs import read_info


def write_index(folder: Path) -> tuple[Path, list[Path]]:
    """List all runs in a folder and its subfolders, the newest first.

    Returns:
        FOLDER/index.html, and the folders of the runs.

    Raises:
        UsageError: the folder contains no run.
    """
    runs = [path.parent for path in folder.rglob("run.json")]
    if not runs:
        raise UsageError(f"{folder} contains no run", "fastface eval ... -o RUN makes one")
    entries = sorted((_entry(folder, run) for run in runs), key=lambda entry: entry["started"], reverse=True)
    page = render("index.html.j2", {"title": folder.resolve().name, "runs": entries})
    path = write_atomically(folder / "index.html", page.encode("utf-8", "replace"), force=True)
    return path, [entry["run"] for entry in entries]


def _entry(folder: Path, run: Path) -> Mapping[str, Any]:
    """The variables of one run; an unfinished or unreadable one has a problem instead of a link."""
    place = run.relative_to(folder).as_posix()
    entry = {
        "run": run,
        "folder": folder.resolve().name if place == "." else place,
        "dataset": "",
        "started": "",
        "recipes": [],
        "report": None,
        "facts": [],
        "opening": [],
        "problem": None,
    }
    try:
        info = read_info(run)
        entry["dataset"] = (info.get("dataset") or {}).get("name") or ""
        entry["started"] = str(info.get("started") or "")
        entry["recipes"] = list(info.get("recipes") or {})
        summary = read_summary(run)
        entry["facts"] = facts(summary, read_rows(run))
        entry["opening"] = opening(summary)
        entry["report"] = link(f"{place}/report.html")
    except UsageError as error:  # one such run must not hide the others
        entry["problem"] = f"{error.message}: {error.hint}" if error.hint else error.message
    return entry
