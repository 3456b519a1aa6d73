"""Options that several commands have, with one text and one completion."""

from __future__ import annotations

from typing import Annotated

import typer

from .completion import complete_recipe

RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        help="Name or path of a recipe.",
        show_default="hyper-fastface",
        autocompletion=complete_recipe,
    ),
]
