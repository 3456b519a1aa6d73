"""Merge the shards of a run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .runs import UNCOMPARED, Run, compare, read_info, read_lines

FOLDERS = ("images", "references", "identities", "vectors")


def merge(shards: Sequence[Path], folder: Path) -> None:
    """Merge the shards of a run into a new folder; rows in several shards are taken once.

    Args:
        shards: folders of runs that only differ in `--shard`.
        folder: RUN/ of the merged run.

    Raises:
        UsageError: a folder is not a run, or the runs are not shards of one run.
    """
    infos = [read_info(shard) for shard in shards]
    for shard, info in zip(shards[1:], infos[1:], strict=True):
        differences = list(compare(_common(infos[0]), _common(info)))
        if differences:
            raise UsageError(
                f"{shards[0]} and {shard} are not shards of one run:\n" + "\n".join(differences[:10]),
                "to compare different runs, use `fastface eval compare`",
            )
    merged = {**infos[0], "options": {**infos[0]["options"], "shard": "1/1"}}
    merged["metrics"] = list(dict.fromkeys(name for info in infos for name in info.get("metrics") or []))
    del merged["version"]
    with Run.open(folder, merged) as run:
        known = run.rows().keys()
        for shard in shards:
            for name in FOLDERS:
                if (shard / name).is_dir():
                    shutil.copytree(shard / name, folder / name, dirs_exist_ok=True)
            run.take(
                (row for _, row in read_lines(shard / "generated.jsonl") if row.get("key") not in known),
                (line for _, line in read_lines(shard / "scores.jsonl") if line.get("key") not in known),
            )
            known = run.rows().keys()


def _common(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of run.json that are equal in all shards."""
    options = {name: value for name, value in info.get("options", {}).items() if name != "shard"}
    return {name: value for name, value in info.items() if name not in UNCOMPARED} | {"options": options}
