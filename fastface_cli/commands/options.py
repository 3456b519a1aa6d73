"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from .completion import complete_device, complete_dtype, complete_recipe

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

DeviceOption = Annotated[
    str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.", autocompletion=complete_device)
]

DtypeOption = Annotated[
    str | None, typer.Option(help="float32, float16 or bfloat16.", autocompletion=complete_dtype)
]
