"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .completion import complete_device, complete_dtype, complete_field, complete_recipe

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
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Change a recipe field: guidance.text=[1,2,2,1]; repeatable.",
        autocompletion=complete_field,
    ),
]
StepsOption = Annotated[
    int | None, typer.Option("--steps", min=1, help="Diffusion steps; selects the distilled checkpoint.")
]
StackOption = Annotated[
    Path | None,
    typer.Option("--stack", metavar="DIR", help="Folder of local weights instead of the recipe's models."),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        help="Device that runs the models: auto, cpu, cuda, cuda:1 or mps.", autocompletion=complete_device
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help="Data type of the models: float32, float16 or bfloat16.", autocompletion=complete_dtype
    ),
]
CompileOption = Annotated[
    bool, typer.Option("--compile", help="Compile the UNet step and the VAE; pays off for many images.")
]
AccelerateOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ITEM=VALUE", help="Change an optimization: channels_last=on, vae=half; repeatable."
    ),
]
CommercialOption = Annotated[
    bool, typer.Option("--commercial", help="Refuse models whose license forbids commercial use.")
]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Do not use the network.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
