"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .completion import complete_device, complete_dtype, complete_field, complete_recipe, complete_saving

if TYPE_CHECKING:
    from ..settings import Saving

PERSON, IMAGE, OUTPUT, RECIPE, MACHINE = "Person", "Image", "Output", "Recipe", "Machine"
"""Headings of options, where a command has many."""

RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        help="Name or path of a recipe.",
        show_default="hyper-fastface",
        autocompletion=complete_recipe,
        rich_help_panel=RECIPE,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Change a recipe field: guidance.text=[1,2,2,1]; repeatable.",
        autocompletion=complete_field,
        rich_help_panel=RECIPE,
    ),
]
StepsOption = Annotated[
    int | None,
    typer.Option(
        "--steps", min=1, help="Diffusion steps; selects the distilled checkpoint.", rich_help_panel=RECIPE
    ),
]
StackOption = Annotated[
    Path | None,
    typer.Option(
        "--stack",
        metavar="DIR",
        help="Folder of local weights instead of the recipe's models.",
        rich_help_panel=RECIPE,
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        help="Device that runs the models: auto, cpu, cuda, cuda:1 or mps.",
        autocompletion=complete_device,
        rich_help_panel=MACHINE,
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help="Data type of the models: float32, float16 or bfloat16.",
        autocompletion=complete_dtype,
        rich_help_panel=MACHINE,
    ),
]
CompileOption = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the UNet step and the VAE; pays off for many images.",
        rich_help_panel=MACHINE,
    ),
]
AccelerateOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ITEM=VALUE",
        help="Change an optimization: channels_last=on, vae=half; repeatable.",
        rich_help_panel=MACHINE,
    ),
]
LowMemoryOption = Annotated[
    str | None,
    typer.Option(
        help="GPU memory in GB to fit into by offloading: 12, 8, 6, auto or off.",
        show_default="auto",
        autocompletion=complete_saving,
        rich_help_panel=MACHINE,
    ),
]
CommercialOption = Annotated[
    bool,
    typer.Option(
        "--commercial", help="Refuse models whose license forbids commercial use.", rich_help_panel=RECIPE
    ),
]
OfflineOption = Annotated[
    bool, typer.Option("--offline", help="Do not use the network.", rich_help_panel=MACHINE)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT)]


def saving(text: str | None) -> Saving | None:
    """The value of `--low-memory`.

    Raises:
        UsageError: there is no such level.
    """
    from ..models.offload import level_of

    if text is None:
        return None
    return "auto" if text == "auto" else level_of(text).name
