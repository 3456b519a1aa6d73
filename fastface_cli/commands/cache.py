"""`fastface cache`: what the downloaded models take up, and getting that room back."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .. import console
from ..errors import UsageError, nearest

app = typer.Typer(help="See and remove downloaded models.", no_args_is_help=True)


@app.command(name="list")
def list_(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show every downloaded model, its size and where it lies.

    Example: fastface cache list
    """
    from ..settings import load_settings
    from ..store import Store, human_bytes

    settings = load_settings()
    store = Store(settings)
    entries, total = store.entries(), store.disk_bytes()
    aside = [(path, path.stat().st_size) for path in store.quarantined()]
    if json:
        console.print_json(
            {
                "ok": True,
                "folder": str(settings.hub_folder),
                "bytes": total,
                "artefacts": [
                    {
                        "name": entry.artefact.name,
                        "files": entry.files,
                        "bytes": entry.bytes,
                        "partial_bytes": entry.partial_bytes,
                        "complete": entry.complete,
                        "path": str(store.path(entry.artefact)),
                    }
                    for entry in entries
                ],
                "quarantine": [{"path": str(path), "bytes": size} for path, size in aside],
            }
        )
        return
    if not entries and not aside:
        console.line(f"nothing is downloaded in {settings.hub_folder}")
        return
    console.print_table(
        "",
        ["model", "files", "size", "state"],
        [
            [
                entry.artefact.name,
                str(entry.files),
                human_bytes(entry.bytes + entry.partial_bytes),
                "complete" if entry.complete else "incomplete",
            ]
            for entry in entries
        ],
    )
    console.line(f"{human_bytes(total)} in {settings.hub_folder}")
    for path, size in aside:
        console.line(f"{human_bytes(size)} with wrong bytes in {path}")


@app.command()
def remove(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Models to remove.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all of them.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object; needs --yes.")] = False,
) -> None:
    """Remove downloaded models, with their partial and quarantined files. Other files stay.

    Example: fastface cache remove sdxl-lightning-2-step-unet
    """
    from ..settings import load_settings
    from ..store import Store, human_bytes, resolve

    store = Store(load_settings())
    entries = {entry.artefact.name: entry.artefact for entry in store.entries()}
    if everything == bool(names):
        raise UsageError("name the models to remove, or give --all", "`fastface cache list` shows them")
    artefacts = list(entries.values())
    if names:
        for name in names:
            if name not in entries and name not in store.known and not name.startswith("hub:"):
                near = nearest(name, [*entries, *store.known])
                raise UsageError(
                    f"there is no downloaded model called '{name}'",
                    f"did you mean '{near}'?" if near else "`fastface cache list` shows them",
                )
        artefacts = [entries.get(name) or resolve(name) for name in names]
    if not yes:
        if json or not sys.stdin.isatty():
            raise UsageError("removing models needs --yes where nobody can be asked")
        typer.confirm(f"Remove {', '.join(artefact.name for artefact in artefacts)}?", abort=True, err=True)
    freed = {artefact.name: store.remove(artefact) for artefact in artefacts}
    if everything:
        freed["quarantine"] = store.clear_quarantine()
    total = sum(freed.values())
    if json:
        console.print_json({"ok": True, "freed_bytes": total, "removed": freed})
        return
    for name, size in freed.items():
        if size:
            console.line(f"removed {name}, {human_bytes(size)}")
    console.line(f"{human_bytes(total)} freed")
