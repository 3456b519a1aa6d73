"""`fastface bench`: how long a picture takes, and what that is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console
from ..errors import UsageError
from .completion import complete_field, complete_recipe, complete_saving
from .options import DeviceOption, DtypeOption

if TYPE_CHECKING:
    from ..benchmark.sides import Side, Weights
    from ..models.acceleration import Acceleration
    from ..models.offload import LevelName
    from ..recipe.schema import Recipe

AGAINST = ("reference",)
WEIGHTS = ("real", "random", "random-small")


def bench(
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            help="Name or path of a recipe; repeat to compare several.",
            autocompletion=complete_recipe,
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="'reference': the published implementation's structure as well.")
    ] = None,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="One side for every item of speed, turned off alone.")
    ] = False,
    weights: Annotated[
        str, typer.Option(help="real; random: full size, no download; random-small: a miniature.")
    ] = "real",
    face: Annotated[
        Path | None, typer.Option(help="Photo to time face detection on; random numbers without it.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change the recipes: sampling.width=512.", autocompletion=complete_field),
    ] = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile each step and the VAE to one static graph.")
    ] = False,
    accelerate: Annotated[
        list[str] | None, typer.Option("--accelerate", help="Change an item of speed: channels_last=on.")
    ] = None,
    low_memory: Annotated[
        str,
        typer.Option(help="off, 12, 8 or 6: GB of the card to fit into.", autocompletion=complete_saving),
    ] = "off",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pictures that share a UNet call.")] = 1,
    repeats: Annotated[int, typer.Option(min=2, help="Rounds that are measured.")] = 50,
    cold: Annotated[
        bool, typer.Option("--cold/--no-cold", help="Also start a process for each side.")
    ] = True,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for bench.json and bench.md.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Fetch nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure how long pictures take: stages, percentiles, first picture, memory, counted operations.

    Sides are run in turn, round by round, so that their ratios hold on a noisy machine.

    Examples:

      fastface bench --recipe pocket-fastface --against reference

      fastface bench --recipe hyper-fastface --weights random --against reference -o results/

      fastface bench --recipe pocket-fastface --ablation
    """
    if against not in (None, *AGAINST):
        raise UsageError(f"--against '{against}' is not known", "the one choice is: reference")
    if weights not in WEIGHTS:
        raise UsageError(f"--weights '{weights}' is not known", f"choose one of {', '.join(WEIGHTS)}")
    from ..settings import load_settings

    settings = load_settings()
    recipes = [_load(name, set_ or []) for name in recipe or [settings.recipe]]
    where = _device(recipes, weights, device or settings.device)

    from ..app.pipeline import check_level
    from ..benchmark import report, run, sides
    from ..models.acceleration import parse
    from ..models.device import pick_device, pick_dtype
    from ..models.offload import level_of

    pick_dtype(dtype, pick_device(where))
    kind: Weights = weights  # type: ignore[assignment]  # one of WEIGHTS
    sides.check_photo(face, kind)
    changes = [*(["compile=on"] if compile_ else []), *(accelerate or [])]
    acceleration, saving = parse(changes), level_of(low_memory)
    check_level(saving, acceleration)
    if acceleration.compile:
        from ..models.compilation import keep_graphs

        keep_graphs(settings.home / "graphs")
    plan = run.Plan(
        sides=_sides(recipes, acceleration, saving.name, against, ablation=ablation),
        source=sides.Source(kind, where, dtype, True if offline else None),
        batch=batch,
        repeats=repeats,
        cold=cold,
        photo=face,
    )
    found = run.measure(plan, console.note)
    text = report.markdown(found)
    if output is not None:
        _write(output, found, text)
    if as_json:
        console.print_json({"ok": True, **found, "error": None})
    else:
        console.line(text.rstrip())


def _load(name: str, overrides: list[str]) -> Recipe:
    from ..recipe.files import load_recipe

    return load_recipe(name, overrides=overrides).recipe


def _device(recipes: list[Recipe], weights: str, wanted: str) -> str:
    """The device, asked before anything is fetched.

    Raises:
        DeviceError: no such device, or a full-size stack and no GPU.
    """
    from ..app.api import check_device
    from ..errors import DeviceError
    from ..models.device import pick_device

    if weights == "real":
        devices = [check_device(recipe, wanted) for recipe in recipes]
        return devices[0]
    found = pick_device(wanted)
    if weights == "random" and found.type == "cpu" and wanted == "auto":
        raise DeviceError(
            "a full-size stack needs a GPU, and there is no CUDA device here",
            "--weights random-small runs anywhere; --device cpu tries all the same (slow, 30 GB of memory)",
        )
    return str(found)


def _sides(
    recipes: list[Recipe],
    acceleration: Acceleration,
    saving: LevelName,
    against: str | None,
    *,
    ablation: bool,
) -> list[Side]:
    from dataclasses import replace

    from ..benchmark.sides import Side
    from ..benchmark.sides import ablation as ablated

    found = []
    for recipe in recipes:
        prefix = f"{recipe.name}, " if len(recipes) > 1 else ""
        ours = ablated(recipe, acceleration) if ablation else [Side("ours", recipe, "ours", acceleration)]
        ours = [replace(side, low_memory=saving) for side in ours]
        if against:
            ours.append(Side("reference", recipe, "reference"))
        found += [replace(side, label=prefix + side.label) for side in ours]
    return found


def _write(folder: Path, found: dict[str, Any], text: str) -> None:
    from ..files import write_atomically

    write_atomically(folder / "bench.json", (json.dumps(found, indent=1) + "\n").encode(), force=True)
    write_atomically(folder / "bench.md", text.encode(), force=True)
    console.note(f"wrote {folder / 'bench.json'} and {folder / 'bench.md'}")
