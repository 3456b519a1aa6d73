"""`fastface licenses`: the licenses of a recipe's model parts."""

from __future__ import annotations

from .. import console
from . import options


def licenses(
    recipe: options.RecipeOption = None,
    steps: options.StepsOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Show each model part of a recipe, its license, and whether it may be used commercially.

    Example: fastface licenses --recipe hyper-fastface
    """
    from ..app.licensing import artifacts_of
    from ..recipe.files import load_recipe
    from ..settings import load_settings

    flags = {} if steps is None else {"sampling.steps": (steps, "--steps")}
    resolved = load_recipe(recipe or load_settings().recipe, flags=flags).recipe
    parts = artifacts_of(resolved)
    uses = {part.commercial for part in parts.values()}
    overall = "no" if "no" in uses else "unclear" if "unclear" in uses else "yes"
    if as_json:
        console.print_json(
            {
                "ok": True,
                "recipe": resolved.name,
                "commercial": overall,
                "parts": [
                    {
                        "role": role,
                        "name": part.name,
                        "licence": part.license,
                        "licence_link": part.license_link,
                        "commercial": part.commercial,
                        "commercial_note": part.commercial_note,
                    }
                    for role, part in parts.items()
                ],
                "error": None,
            }
        )
        return
    console.print_table(
        "",
        ["part", "model", "license", "commercial use"],
        [
            [role, part.name, part.license, f"{part.commercial}: {note}" if note else part.commercial]
            for role, part in parts.items()
            for note in (part.commercial_note,)
        ],
    )
    for link in dict.fromkeys(part.license_link for part in parts.values() if part.license_link):
        console.line(link)
    console.line(f"commercial use of {resolved.name} as a whole: {overall}")
