"""Read back how an image was made, to replay it. The files are not trusted."""

from __future__ import annotations

import json
import warnings
import zlib
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from ..errors import UsageError
from .metadata import (
    KEYWORD,
    MAX_TEXT,
    SCHEMA,
    LocalPart,
    Provenance,
    file_name,
    is_public,
    map_references,
    run_of_packet,
)

MAX_FILE = 512 * 1024 * 1024
"""Maximum bytes of an image file."""


def read(path: Path) -> Provenance:
    """Read how an image was made.

    Args:
        path: an image written by fastface.

    Raises:
        UsageError: the file is not an image, or its metadata is missing, malformed, too long or newer.
    """
    text = _chunk(path)
    if text is None:
        raise UsageError(
            f"{path} does not say how it was made",
            "it was written with --no-metadata or by another program, or an editor removed the metadata; "
            "give --recipe and --prompt instead",
        )
    return parse(text, path)


def parse(text: str, path: Path) -> Provenance:
    """Parse the `fastface` chunk of an image.

    Args:
        text: the chunk.
        path: the image, for errors.

    Raises:
        UsageError: the text is malformed, too long or of a newer version.
    """
    if len(text) > MAX_TEXT:
        raise UsageError(f"the metadata of {path} is longer than the limit of {MAX_TEXT} characters")
    try:
        data = from_json(text)
        if not isinstance(data, dict):
            raise ValueError("not an object")
        schema = data.pop("schema", None)
        if type(schema) is int and schema > SCHEMA:
            raise UsageError(
                f"{path} was written by a newer fastface (metadata schema {schema}; this one reads {SCHEMA})",
                "upgrade fastface",
            )
        if type(schema) is not int or schema != SCHEMA:
            raise ValueError(f"unknown schema {str(schema)[:40]!r}")
        return _provenance(data)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(map(str, first["loc"]))[:80]
        raise _malformed(path, f"{place}: {first['msg'][:200]}") from error
    except (ValueError, RecursionError) as error:
        raise _malformed(path, str(error)[:200]) from error


def _malformed(path: Path, problem: str) -> UsageError:
    return UsageError(
        f"the metadata of {path} is malformed ({' '.join(problem.split())})",
        "give --recipe and --prompt instead",
    )


def _provenance(data: dict[str, Any]) -> Provenance:
    local_parts: list[LocalPart] = []

    def without_paths(field: str, reference: Any) -> Any:
        if isinstance(reference, str) and not is_public(reference):
            # Never accept a path from an image: local files are opened only where the user names them.
            raise ValueError(f"{field}: there is no model called '{reference[:80]}'")
        if not (isinstance(reference, dict) and "local" in reference):
            return reference
        name, mark = reference["local"], reference.get("mark")
        if not (isinstance(name, str) and name and name == file_name(name) and isinstance(mark, str | None)):
            raise ValueError(f"{field}: a local file without a plain name")
        local_parts.append(LocalPart(field, name, mark))
        return f"local:{name}"

    if "local_parts" in data:
        raise ValueError("local_parts: not a field of the metadata")
    recipe = data.get("recipe")
    model = recipe.get("model") if isinstance(recipe, dict) else None
    if isinstance(recipe, dict) and isinstance(model, dict):
        data = {**data, "recipe": {**recipe, "model": map_references(model, without_paths)}}
    provenance = Provenance.model_validate_json(json.dumps(data))
    stack, steps = provenance.recipe.model, provenance.recipe.sampling.steps
    other_steps = {
        f"model.{part}.{step}"
        for part in ("unet", "distillation")
        if isinstance(by_step := getattr(stack, part), dict)
        for step in by_step
        if step != steps
    }
    used = tuple(part for part in local_parts if part.field not in other_steps)
    return provenance.model_copy(update={"local_parts": used})


def _chunk(path: Path) -> str | None:
    """The `fastface` text of an image; Pillow limits the size of decompressed chunks."""
    from PIL import Image, UnidentifiedImageError

    try:
        if not path.is_file():
            problem = f"{path} is not a file" if path.exists() else f"there is no image {path}"
            raise UsageError(problem, "--from requires an image made by fastface")
        if path.stat().st_size > MAX_FILE:
            raise UsageError(f"{path} is too large to be an image made by fastface")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
                if image.format != "PNG":
                    packet = image.info.get("xmp")
                    return run_of_packet(packet) if isinstance(packet, bytes) else None
                if KEYWORD not in image.info:
                    image.load()  # an editor may have moved the text behind the pixels
                text = image.info.get(KEYWORD)
    except UnidentifiedImageError as error:
        raise UsageError(
            f"{path} is not a PNG, JPEG or WebP file", "only images made by fastface can be replayed"
        ) from error
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        zlib.error,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise UsageError(f"cannot read {path}: {error}", "check that the file is complete") from error
    return text if isinstance(text, str) else None
