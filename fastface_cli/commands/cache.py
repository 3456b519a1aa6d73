"""`fastface cache`: list and remove downloaded models."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .. import console
from ..errors import UsageError, nearest
from .completion import complete_cached

app = typer.Typer(help="List and remove downloaded models.", no_args_is_help=True)


@app.command(name="list")
def list_(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List every downloaded model and every cached fused model, with size and folder.

    Example: fastface cache list
    """
    from ..identity.cache import Remembered
    from ..settings import load_settings
    from ..store import Store, human_bytes

    settings = load_settings()
    store = Store(settings)
    entries, fused = store.entries(), store.fused.entries()
    total = store.disk_bytes()
    kept = Remembered(settings.home)
    people = kept.files()
    people_bytes = sum(path.stat().st_size for path in people)
    aside = [(path, path.stat().st_size) for path in store.quarantined()]
    if json:
        console.print_json(
            {
                "ok": True,
                "folder": str(settings.hub_folder),
                "bytes": total,
                "artefacts": [
                    {
                        "name": entry.artifact.name,
                        "files": entry.files,
                        "bytes": entry.bytes,
                        "partial_bytes": entry.partial_bytes,
                        "complete": entry.complete,
                        "path": str(store.path(entry.artifact)),
                    }
                    for entry in entries
                ],
                "fused": [
                    {
                        "name": entry.name,
                        "recipe": entry.recipe,
                        "inputs": list(entry.inputs),
                        "bytes": entry.bytes,
                        "path": str(store.fused.file(entry.key)),
                    }
                    for entry in fused
                ],
                "identities": {"count": len(people), "bytes": people_bytes, "path": str(kept.folder)},
                "quarantine": [{"path": str(path), "bytes": size} for path, size in aside],
            }
        )
        return
    if not entries and not fused and not aside and not people:
        console.line(f"nothing is downloaded in {settings.hub_folder}")
        return
    if entries:
        console.print_table(
            "",
            ["model", "files", "size", "state"],
            [
                [
                    entry.artifact.name,
                    str(entry.files),
                    human_bytes(entry.bytes + entry.partial_bytes),
                    "complete" if entry.complete else "incomplete",
                ]
                for entry in entries
            ],
        )
        console.line(f"{human_bytes(total)} in {settings.hub_folder}")
    if fused:
        console.print_table(
            "",
            ["fused model", "first recipe", "size", "inputs"],
            [
                [entry.name, entry.recipe, human_bytes(entry.bytes), ", ".join(entry.inputs)]
                for entry in fused
            ],
        )
        console.line(f"{human_bytes(sum(entry.bytes for entry in fused))} in {store.fused.folder}")
    if people:
        console.line(f"{human_bytes(people_bytes)}, {len(people)} cached identities in {kept.folder}")
    for path, size in aside:
        console.line(f"{human_bytes(size)} with wrong bytes in {path}")


@app.command()
def remove(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Models to remove.", autocompletion=complete_cached),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove everything in the cache.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object; needs --yes.")] = False,
) -> None:
    """Remove downloaded models, including partial and quarantined files. Other files stay.

    Examples:

      fastface cache remove sdxl-lightning-2-step-unet

      fastface cache remove identities
    """
    from ..identity.cache import NAME as IDENTITIES
    from ..identity.cache import Remembered
    from ..settings import load_settings
    from ..store import Store, human_bytes, resolve

    settings = load_settings()
    store, people = Store(settings), Remembered(settings.home)
    entries = {entry.artifact.name: entry.artifact for entry in store.entries()}
    fused = {entry.name: entry for entry in store.fused.entries()}
    if everything == bool(names):
        raise UsageError("name the models to remove, or pass --all", "`fastface cache list` shows them")
    artifacts, keys = list(entries.values()), fused
    forget = everything or IDENTITIES in (names or [])
    if names:
        names = [name for name in names if name != IDENTITIES]
        keys = {name: fused[name] for name in names if name in fused}
        names = [name for name in names if name not in fused]
        for name in names:
            if name not in entries and name not in store.known and not name.startswith("hub:"):
                near = nearest(name, [*entries, *fused, *store.known])
                raise UsageError(
                    f"there is no downloaded model called '{name}'",
                    f"did you mean '{near}'?" if near else "`fastface cache list` shows them",
                )
        artifacts = [entries.get(name) or resolve(name) for name in names]
    if not yes:
        if json or sys.stdin is None or not sys.stdin.isatty():
            raise UsageError("removing models needs --yes if there is no terminal for a confirmation")
        targets = [*(artifact.name for artifact in artifacts), *keys, *([IDENTITIES] if forget else [])]
        typer.confirm(f"Remove {', '.join(targets)}?", abort=True, err=True)
    freed = {artifact.name: store.remove(artifact) for artifact in artifacts}
    freed |= {name: store.fused.remove(entry.key) for name, entry in keys.items()}
    if forget:
        freed[IDENTITIES] = people.clear()
    if everything:
        freed["fused"] = store.fused.clear()
        freed["quarantine"] = store.clear_quarantine()
    total = sum(freed.values())
    if json:
        console.print_json({"ok": True, "freed_bytes": total, "removed": freed})
        return
    for name, size in freed.items():
        if size:
            console.line(f"removed {name}, {human_bytes(size)}")
    console.line(f"{human_bytes(total)} freed")
