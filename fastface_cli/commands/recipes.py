"""`fastface recipes`: list, show and validate recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console
from ..errors import FastFaceError, RecipeError
from . import options
from .completion import complete_recipe

if TYPE_CHECKING:
    from ..recipe.files import RecipeInfo

app = typer.Typer(help="List, show and validate recipes.", no_args_is_help=True)


@app.command("list")
def list_(
    all_: Annotated[
        bool,
        typer.Option("--all", help="List every recipe, not only one for each model.", show_default=False),
    ] = False,
    as_json: options.JsonOption = False,
) -> None:
    """List the models with their recipes, or with --all every recipe.

    Examples:

      fastface recipes list

      fastface recipes list --all
    """
    from ..recipe.files import list_recipes

    infos = list_recipes()
    if as_json:
        rows = [{"name": info.name, "short": info.short, "summary": info.summary} for info in infos]
        console.print_json({"ok": True, "recipes": rows, "error": None})
    elif all_:
        rows_ = ((info.name, info.short or "", info.summary) for info in infos)
        console.print_table("", ("recipe", "short", "summary"), rows_)
    else:
        _list_models([info for info in infos if info.short is not None])
        console.line(
            f"`fastface recipes list --all` lists all {len(infos)}: each model with each method, such as "
            "hyper-dcg, and with other adapters, such as lightning-plusface"
        )


def _list_models(infos: list[RecipeInfo]) -> None:
    """Print one row for each model: what it costs to fetch, and what its licenses allow."""
    from ..app.licensing import artifacts_of
    from ..recipe.files import load_recipe
    from ..settings import load_settings
    from ..store import human_bytes

    default = load_settings().recipe
    rows = []
    for info in infos:
        recipe = load_recipe(info.name).recipe
        parts = {part.name: part for part in artifacts_of(recipe).values()}.values()
        uses = {part.commercial for part in parts}
        rows.append(
            (
                f"{info.short}{' (default)' if default in (info.short, info.name) else ''}",
                info.name,
                info.summary.partition("; ")[2] or info.summary,
                f"{recipe.sampling.width}x{recipe.sampling.height}",
                human_bytes(sum(part.bytes for part in parts if not part.packaged)),
                "no" if "no" in uses else "unclear" if "unclear" in uses else "yes",
            )
        )
    rows.sort(key=lambda row: "(default)" not in row[0])
    console.print_table("", ("model", "recipe", "what it is", "size", "download", "commercial use"), rows)


@app.command()
def show(
    name: Annotated[
        str,
        typer.Argument(help="Name or path of a recipe.", autocompletion=complete_recipe, show_default=False),
    ],
    *,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Print every value and its origin.", show_default=False)
    ] = False,
    steps: options.StepsOption = None,
    overrides: options.SetOption = None,
    stack: options.StackOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Print a recipe file, or with --resolved all its values after inheritance and overrides.

    The output is a recipe too: save it, edit it, and pass its path as --recipe.

    Examples:

      fastface recipes show hyper-fastface

      fastface recipes show pocket --resolved --set guidance.text=[1,2,2,1]
    """
    from ..recipe.files import find_recipe, load_recipe
    from ..recipe.tree import read_text
    from ..recipe.yaml_text import to_yaml

    changed = steps is not None or overrides or stack is not None
    flags: dict[str, tuple[Any, str]] = {} if steps is None else {"sampling.steps": (steps, "--steps")}
    loaded = load_recipe(name, overrides=overrides or (), flags=flags, stack=stack)
    if as_json:
        recipe = loaded.recipe
        console.print_json(
            {
                "ok": True,
                "recipe": recipe.canonical(),
                "origins": loaded.origins,
                "digest": recipe.digest(),
                "error": None,
            }
        )
    elif resolved or changed:
        console.line(to_yaml(loaded, origins=resolved).rstrip("\n"))
    else:
        path = find_recipe(name)
        console.line(read_text(path, str(path)).rstrip("\n"))


@app.command()
def validate(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE...",
            help="Names or paths of recipes.",
            show_default=False,
            autocompletion=complete_recipe,
        ),
    ],
    stack: options.StackOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Check recipes and print their problems. The exit code is 2 if any is invalid.

    Example: fastface recipes validate hyper lcm
    """
    from ..recipe.files import load_recipe

    results: list[dict[str, Any]] = []
    failures: list[FastFaceError] = []
    for name in recipes:
        try:
            loaded = load_recipe(name, stack=stack)
        except FastFaceError as error:
            failures.append(error)
            results.append({"recipe": name, "ok": False, "problems": error.message.split("\n")})
        else:
            results.append({"recipe": name, "ok": True, "digest": loaded.recipe.digest()})
            if not as_json:
                console.line(f"{name}: valid")
    if failures:
        hint = next((error.hint for error in failures if error.hint), None)
        failure = RecipeError("\n".join(error.message for error in failures), hint)
        failure.partial = {"recipes": results}  # type: ignore[attr-defined]
        raise failure
    if as_json:
        console.print_json({"ok": True, "recipes": results, "error": None})
