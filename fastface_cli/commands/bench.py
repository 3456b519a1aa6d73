"""`fastface bench`: measure speed and memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console
from ..errors import UsageError
from . import options
from .completion import complete_recipe, complete_saving

if TYPE_CHECKING:
    from ..benchmark.sides import Side, WeightSource
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
            help="Name or path of a recipe; repeatable, to compare several.",
            autocompletion=complete_recipe,
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Also measure 'reference', the published implementation.")
    ] = None,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="Also measure with each optimization disabled.")
    ] = False,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary",
            metavar="ITEM=VALUE",
            help="Also measure with this optimization changed; repeatable, see --accelerate.",
        ),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="real, random (full size, no download) or random-small (miniature).")
    ] = "real",
    face: Annotated[
        Path | None,
        typer.Option(help="Photo for timing face detection; without it, a random identity is used."),
    ] = None,
    set_: options.SetOption = None,
    compile_: options.CompileOption = False,
    accelerate: options.AccelerateOption = None,
    low_memory: Annotated[
        str,
        typer.Option(
            help="GPU memory in GB to fit into by offloading: 12, 8, 6 or off.",
            autocompletion=complete_saving,
        ),
    ] = "off",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Number of images per UNet call.")] = 1,
    repeats: Annotated[int, typer.Option(min=2, help="Number of measured rounds.")] = 50,
    cold: Annotated[
        bool, typer.Option("--cold/--no-cold", help="Also measure a new process for each configuration.")
    ] = True,
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Output folder for bench.json and bench.md.")
    ] = None,
    offline: options.OfflineOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Measure the time per image by stage, the first image, memory and the number of operations.

    Configurations alternate within each round, so that their ratios are reliable on a noisy machine.

    Examples:

      fastface bench --recipe pocket-fastface --against reference

      fastface bench --recipe hyper-fastface --weights random --against reference -o results/

      fastface bench --recipe pocket-fastface --ablation
    """
    if against not in (None, *AGAINST):
        raise UsageError(f"unknown value for --against: '{against}'", "the only choice is: reference")
    if weights not in WEIGHTS:
        raise UsageError(f"unknown value for --weights: '{weights}'", f"choose one of {', '.join(WEIGHTS)}")
    from ..settings import load_settings

    settings = load_settings()
    recipes = [_load(name, set_ or []) for name in recipe or [settings.recipe]]
    device_name = _device(recipes, weights, device or settings.device)

    from ..benchmark import run, sides, tables
    from ..models.acceleration import parse
    from ..models.device import pick_device, pick_dtype
    from ..models.offload import check_level, level_of

    pick_dtype(dtype, pick_device(device_name))
    if against and any(each.adapter.kind != "faceid_plusv2" for each in recipes):
        raise UsageError("the published implementation has FaceID alone", "omit --against for this recipe")
    source: WeightSource = weights  # type: ignore[assignment]  # one of WEIGHTS
    sides.check_photo(face, source)
    changes = [*(["compile=on"] if compile_ else []), *(accelerate or [])]
    acceleration, saving = parse(changes), level_of(low_memory)
    check_level(saving, acceleration)
    if acceleration.compile:
        from ..models.compilation import keep_graphs

        keep_graphs(settings.home / "graphs")
    plan = run.BenchmarkPlan(
        sides=_sides(recipes, acceleration, vary or [], saving.name, against, ablation=ablation),
        source=sides.Source(source, device_name, dtype, True if offline else None),
        batch=batch,
        repeats=repeats,
        cold=cold,
        photo=face,
    )
    report = run.measure(plan, console.note)
    text = tables.markdown(report)
    if output is not None:
        _write(output, report, text)
    if as_json:
        console.print_json({"ok": True, **report, "error": None})
    else:
        console.line(text.rstrip())


def _load(name: str, overrides: list[str]) -> Recipe:
    from ..recipe.files import load_recipe

    return load_recipe(name, overrides=overrides).recipe


def _device(recipes: list[Recipe], weights: str, requested: str) -> str:
    """Select the device before anything is downloaded.

    Raises:
        DeviceError: the device does not exist, or a full-size model has no GPU.
    """
    from ..app.runtime import check_device
    from ..errors import DeviceError
    from ..models.device import pick_device

    if weights == "real":
        devices = [check_device(recipe, requested) for recipe in recipes]
        return devices[0]
    selected = pick_device(requested)
    if weights == "random" and selected.type == "cpu" and requested == "auto":
        raise DeviceError(
            "a full-size model needs a GPU, and there is no CUDA device here",
            "use --weights random-small, which runs anywhere, or --device cpu (slow, 30 GB of memory)",
        )
    return str(selected)


def _sides(
    recipes: list[Recipe],
    acceleration: Acceleration,
    vary: list[str],
    saving: LevelName,
    against: str | None,
    *,
    ablation: bool,
) -> list[Side]:
    from dataclasses import replace

    from ..benchmark.sides import Side
    from ..benchmark.sides import ablation as ablated
    from ..models.acceleration import parse

    sides: list[Side] = []
    for recipe in recipes:
        prefix = f"{recipe.name}, " if len(recipes) > 1 else ""
        ours = ablated(recipe, acceleration) if ablation else [Side("ours", recipe, "ours", acceleration)]
        ours += [Side(change, recipe, "ours", parse([change], acceleration)) for change in vary]
        ours = [replace(side, low_memory=saving) for side in ours]
        if against:
            ours.append(Side("reference", recipe, "reference"))
        sides += [replace(side, label=prefix + side.label) for side in ours]
    return sides


def _write(folder: Path, report: dict[str, Any], text: str) -> None:
    from ..files import write_atomically

    write_atomically(folder / "bench.json", (json.dumps(report, indent=1) + "\n").encode(), force=True)
    write_atomically(folder / "bench.md", text.encode(), force=True)
    console.note(f"wrote {folder / 'bench.json'} and {folder / 'bench.md'}")
