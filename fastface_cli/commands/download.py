"""`fastface download`: fetch the models of recipes ahead of time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console
from ..errors import ModelUnavailableError, RecipeError, UsageError, nearest
from .completion import complete_model

if TYPE_CHECKING:
    from ..store import Artifact, FileStatus, Store

DATASET = "diversefaces"
"""The only name that is a dataset and not a model."""


def download(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE|MODEL",
            help="Recipes, models, or the dataset 'diversefaces'. Default: the default recipe.",
            show_default=False,
            autocompletion=complete_model,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show downloaded and missing files; fetch nothing.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every downloaded file; fetch nothing.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    steps: Annotated[
        int | None,
        typer.Option(help="Fetch the checkpoints for this step count.", min=1, show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fetch the missing models of recipes, resume partial downloads, and verify every file.

    Example: fastface download hyper-fastface --dry-run
    """
    from ..settings import load_settings
    from ..store import Store

    settings = load_settings()
    store = Store(settings, offline=True if offline else None)
    if names and DATASET in names:
        if names != [DATASET] or dry_run or verify:
            raise UsageError(
                f"{DATASET} is a dataset and cannot be combined with other names or options",
                f"run `fastface download {DATASET}`",
            )
        _fetch_dataset(store, json=json)
        return
    chosen = names or ([] if verify else [settings.recipe])
    artifacts = _artifacts(chosen, steps)
    if verify:
        _verify(store, artifacts or [entry.artifact for entry in store.entries()], json=json)
    elif dry_run:
        _show(store, artifacts, json=json)
    else:
        _fetch(store, artifacts, json=json)


def _fetch_dataset(store: Store, *, json: bool) -> None:
    """Fetch the published dataset and print the number of identities and prompts."""
    from ..evaluation.dataset import load_dataset
    from ..evaluation.download import fetch_diversefaces

    path = fetch_diversefaces(store.settings, offline=store.offline, log=console.note)
    dataset = load_dataset(path)
    counts = {"identities": len(dataset.subjects), "prompts": len(dataset.prompts)}
    if json:
        console.print_json({"ok": True, "datasets": [{"name": DATASET, "path": str(path), **counts}]})
        return
    console.line(f"{DATASET}: {path}, {counts['identities']} identities, {counts['prompts']} prompts")


def _artifacts(names: list[str], steps: int | None) -> list[Artifact]:
    """The artifacts of recipes and models, without duplicates."""
    from ..recipe.files import load_recipe, recipe_names
    from ..store import load_manifest, resolve

    artifacts: dict[str, Artifact] = {}
    for name in names:
        if name in load_manifest() or name.startswith("hub:"):
            artifacts.setdefault(name, resolve(name))
            continue
        try:
            resolved = load_recipe(
                name, flags={} if steps is None else {"sampling.steps": (steps, "--steps")}
            )
        except RecipeError as error:
            near = nearest(name, load_manifest())
            if near is None or nearest(name, [near, *recipe_names()]) != near:
                raise
            raise RecipeError(
                f"there is no recipe or model called '{name}'", f"did you mean '{near}'?"
            ) from error
        for reference in resolved.recipe.references().values():
            artifact = resolve(reference)
            artifacts.setdefault(artifact.name, artifact)
    return list(artifacts.values())


def _fetch(store: Store, artifacts: list[Artifact], *, json: bool) -> None:
    with console.download_bars() as progress:
        paths = store.ensure(artifacts, progress=progress)
    if json:
        console.print_json(
            {"ok": True, "artefacts": [{"name": name, "path": str(path)} for name, path in paths.items()]}
        )
        return
    for name, path in paths.items():
        console.line(f"{name}: {path}")


def _show(store: Store, artifacts: list[Artifact], *, json: bool) -> None:
    from ..store import human_bytes

    states = {artifact.name: store.status(artifact) for artifact in artifacts}
    missing = {item.artifact.name: item.bytes for item in store.missing(artifacts)}
    total = sum(_size(artifact, states[artifact.name]) for artifact in artifacts)
    if json:
        console.print_json(
            {
                "ok": True,
                "folder": str(store.settings.hub_folder),
                "bytes": total,
                "missing_bytes": sum(missing.values()),
                "artefacts": [
                    {
                        "name": artifact.name,
                        "kind": artifact.kind,
                        "bytes": _size(artifact, states[artifact.name]),
                        "missing_bytes": missing.get(artifact.name, 0),
                        "licence": artifact.license,
                        "licence_link": artifact.license_link,
                        "commercial": artifact.commercial,
                        "commercial_note": artifact.commercial_note,
                        "path": str(store.path(artifact)),
                        "repo": artifact.repo,
                        "commit": artifact.commit,
                        "url": artifact.url,
                        "files": _with_hashes(artifact, states[artifact.name]),
                    }
                    for artifact in artifacts
                ],
            }
        )
        return
    rows = [
        [
            artifact.name,
            _counts(states[artifact.name]),
            human_bytes(_size(artifact, states[artifact.name])),
            human_bytes(missing[artifact.name]) if missing.get(artifact.name) else "",
            artifact.license,
            artifact.commercial,
        ]
        for artifact in artifacts
    ]
    console.print_table("", ["model", "files", "size", "to fetch", "license", "commercial use"], rows)
    to_fetch = sum(missing.values())
    console.line(
        f"{human_bytes(total)} in total, "
        + (f"{human_bytes(to_fetch)} to fetch" if missing else "nothing to fetch")
        + f"; stored in {store.settings.hub_folder}"
    )
    for artifact in artifacts:
        if artifact.commercial != "yes" and artifact.commercial_note:
            console.line(f"{artifact.name}: {artifact.commercial_note} ({artifact.license_link})")


def _verify(store: Store, artifacts: list[Artifact], *, json: bool) -> None:
    with console.download_bars() as progress:
        rows = [
            (artifact, file) for artifact in artifacts for file in store.verify(artifact, progress=progress)
        ]
    bad = [file for _, file in rows if file.state == "bad"]
    report = [{"name": artifact.name, **_as_json(file)} for artifact, file in rows]
    if not json:
        console.print_table(
            "",
            ["model", "file", "state"],
            [[artifact.name, file.path, file.state] for artifact, file in rows],
        )
    if bad:
        error = ModelUnavailableError(
            "; ".join(file.detail for file in bad),
            "run `fastface download` to fetch the quarantined files again",
        )
        error.partial = {"files": report}
        raise error
    if json:
        console.print_json({"ok": True, "files": report})


def _with_hashes(artifact: Artifact, states: list[FileStatus]) -> list[dict[str, Any]]:
    hashes = {file.path: file.sha256 for file in artifact.files}
    return [{**_as_json(file), "sha256": hashes.get(file.path)} for file in states]


def _size(artifact: Artifact, files: list[FileStatus]) -> int:
    return artifact.bytes or sum(file.bytes for file in files)


def _counts(files: list[FileStatus]) -> str:
    here = sum(file.state in ("present", "unverified") for file in files)
    partial = sum(file.state == "partial" for file in files)
    return f"{here} of {len(files)}" + (f", {partial} partial" if partial else "")


def _as_json(file: FileStatus) -> dict[str, Any]:
    fields: dict[str, Any] = {"path": file.path, "bytes": file.bytes, "state": file.state, "here": file.here}
    return fields | ({"detail": file.detail} if file.detail else {})
