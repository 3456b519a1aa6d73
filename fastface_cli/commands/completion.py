"""Shell completion. It must respond immediately, so nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def complete_recipe(incomplete: str) -> list[str]:
    """Complete names of recipes; the shell completes paths."""
    from ..recipe.files import recipe_names

    return _starting(incomplete, recipe_names())


def complete_model(incomplete: str) -> list[str]:
    """Complete the recipes and models that `fastface download` accepts."""
    from ..recipe.files import recipe_names
    from ..store.manifest import load_manifest

    return _starting(incomplete, [*recipe_names(), *load_manifest()])


def complete_cached(incomplete: str) -> list[str]:
    """Complete downloaded and fused models in the cache."""
    from ..identity.cache import NAME as IDENTITIES
    from ..identity.cache import Remembered
    from ..settings import load_settings
    from ..store import Store

    settings = load_settings()
    store = Store(settings)
    fused = [entry.name for entry in store.fused.entries()]
    identities = Remembered(settings.home)
    others = [*fused, *([IDENTITIES] if identities.files() else [])]
    return _starting(incomplete, [entry.artifact.name for entry in store.entries()] + others)


def complete_field(incomplete: str) -> list[str]:
    """Complete the fields of a recipe, for `--set`."""
    from ..recipe.schema import Recipe

    return _starting(incomplete, [f"{field}=" for field in _fields(Recipe, "")])


def complete_device(incomplete: str) -> list[str]:
    """Complete device types."""
    return _starting(incomplete, ("auto", "cpu", "cuda", "mps"))


def complete_dtype(incomplete: str) -> list[str]:
    """Complete data types."""
    return _starting(incomplete, ("float32", "float16", "bfloat16"))


def complete_saving(incomplete: str) -> list[str]:
    """Complete memory saving levels."""
    return _starting(incomplete, ("auto", "off", "12", "8", "6"))


def complete_metric(incomplete: str) -> list[str]:
    """Complete installed metrics; in a list 'id,clip-l14', the last one."""
    from importlib.metadata import entry_points

    before, comma, last = incomplete.rpartition(",")
    names = sorted({point.name for point in entry_points(group="fastface.metrics")})
    return [f"{before}{comma}{name}" for name in _starting(last, names)]


def _fields(section: type, prefix: str) -> Iterator[str]:
    """Yield the dotted names of the values in a section of the recipe."""
    from ..recipe.schema import Section

    assert issubclass(section, Section)
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        elif name not in ("name", "summary"):
            yield f"{prefix}{name}"


def _starting(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
