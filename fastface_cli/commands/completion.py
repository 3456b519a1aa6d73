"""What the shell offers on Tab. Everything here must come at once: nothing imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def complete_recipe(incomplete: str) -> list[str]:
    """Recipes by name; a shell completes the paths of files by itself."""
    from ..recipe.files import recipe_names

    return _starting(incomplete, recipe_names())


def complete_model(incomplete: str) -> list[str]:
    """Recipes and models, as `fastface download` takes them."""
    from ..recipe.files import recipe_names
    from ..store.manifest import load_manifest

    return _starting(incomplete, [*recipe_names(), *load_manifest()])


def complete_cached(incomplete: str) -> list[str]:
    """Models that take room on this disk, downloaded and fused."""
    from ..identity.cache import NAME as IDENTITIES
    from ..identity.cache import Remembered
    from ..settings import load_settings
    from ..store import Store

    settings = load_settings()
    store = Store(settings)
    fused = [one.name for one in store.fused.entries()]
    people = Remembered(settings.home)
    kept = [*fused, *([IDENTITIES] if people.files() else [])]
    return _starting(incomplete, [entry.artifact.name for entry in store.entries()] + kept)


def complete_field(incomplete: str) -> list[str]:
    """Fields of a recipe, for `--set`."""
    from ..recipe.schema import Recipe

    return _starting(incomplete, [f"{field}=" for field in _fields(Recipe, "")])


def complete_device(incomplete: str) -> list[str]:
    """Devices by kind."""
    return _starting(incomplete, ("auto", "cpu", "cuda", "mps"))


def complete_dtype(incomplete: str) -> list[str]:
    """Number formats."""
    return _starting(incomplete, ("float32", "float16", "bfloat16"))


def complete_saving(incomplete: str) -> list[str]:
    """Levels of saving memory."""
    return _starting(incomplete, ("auto", "off", "12", "8", "6"))


def complete_metric(incomplete: str) -> list[str]:
    """Metrics that are installed; of a list 'id,clip-l14' the last one."""
    from importlib.metadata import entry_points

    before, comma, last = incomplete.rpartition(",")
    names = sorted({point.name for point in entry_points(group="fastface.metrics")})
    return [f"{before}{comma}{name}" for name in _starting(last, names)]


def _fields(section: type, prefix: str) -> Iterator[str]:
    """Dotted names of the values below a section of the recipe."""
    from ..recipe.schema import Section

    assert issubclass(section, Section)
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        elif name not in ("name", "summary"):
            yield f"{prefix}{name}"


def _starting(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
