"""What a PNG says about how it was made, and reading that back for replay.

Three text chunks: `parameters` (the lines that A1111-style viewers show), `fastface` (JSON, everything that a
replay needs but for the photo) and an XMP packet that marks the picture as made by a trained model (IPTC
digital source type). None holds a path of the machine, the photo or the embedding.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import re
import warnings
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Annotated, Any
from xml.sax.saxutils import quoteattr

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .. import __version__
from ..errors import UsageError
from ..recipe.schema import Recipe, Weight, WeightFunction
from ..store.manifest import load_manifest

if TYPE_CHECKING:
    from ..app.pipeline import Picture

SCHEMA = 1
"""Version of the JSON in `fastface`; a reader refuses newer ones."""

KEYWORD = "fastface"
MAX_TEXT = 1024 * 1024
"""Characters of the JSON that are written and read at most."""

MAX_FILE = 512 * 1024 * 1024
"""Bytes of a picture that is opened at all."""

PACKAGES = {
    "fastface": "fastface-cli",
    "torch": "torch",
    "diffusers": "diffusers",
    "transformers": "transformers",
}

_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_SAMPLERS = {"ddim": "DDIM", "euler": "Euler", "euler_ancestral": "Euler a", "lcm": "LCM"}


@dataclass(frozen=True)
class LocalPart:
    """A model part that was a file or folder of the machine that made the picture."""

    field: str
    """Where it stands in the recipe: `model.base`, `model.loras.0.file`."""
    name: str
    """Its file name, without any folder."""
    mark: str | None
    """`content_mark` of what was there; None where it could not be read."""


@dataclass(frozen=True)
class Provenance:
    """How a picture was made, as it says itself."""

    recipe: Recipe
    """As resolved for that run; a part listed in `local_parts` holds `local:NAME`, which leads nowhere."""
    prompt: str
    negative_prompt: str | None
    seed: int
    adapter_scale: float
    identity_digest: str
    """Of the person: see `Identity`."""
    unet_samples: int
    versions: Mapping[str, str]
    """fastface, torch, diffusers and transformers, as installed then."""
    local_parts: tuple[LocalPart, ...] = ()
    best_of: BestOf | None = None
    lossy: Mapping[str, Any] | None = None
    """Items of speed that cost precision."""

    def as_run(self) -> Recipe:
        """The recipe with prompt, negative prompt, seed and adapter scale of this very picture."""
        return self.recipe.model_copy(
            update={
                "prompt": self.prompt,
                "negative_prompt": self.negative_prompt,
                "seed": self.seed,
                "adapter": self.recipe.adapter.model_copy(update={"scale": self.adapter_scale}),
            }
        )

    def require_local_parts(self, given: Collection[str]) -> None:
        """Check that every local file of the original run is named anew.

        Args:
            given: the fields that the user overrides (`model.base`, `model`).

        Raises:
            UsageError: one is not; the hint says how to name it.
        """
        missing = [
            part
            for part in self.local_parts
            if not any(part.field == field or part.field.startswith(f"{field}.") for field in given)
        ]
        if missing:
            named = ", ".join(f"'{part.name}' as {part.field}" for part in missing)
            raise UsageError(
                f"this picture was made with local files ({named}), and it does not carry where they lie",
                "add " + " ".join(f"--set {part.field}=PATH" for part in missing),
            )

    def changed_local_parts(self, recipe: Recipe) -> list[LocalPart]:
        """The local parts whose stand-in in `recipe` has another content than the original had.

        Args:
            recipe: this one with the local parts named anew.
        """
        now: dict[str, str | None] = {}

        def measure(field: str, reference: Any) -> Any:
            if isinstance(reference, str) and not _public(reference):
                now[field] = content_mark(Path(reference).expanduser())
            return reference

        _map_references(recipe.canonical()["model"], measure)
        return [part for part in self.local_parts if part.mark and now.get(part.field) != part.mark]


class BestOf(BaseModel):
    """That a picture was chosen among several, and by what."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    count: Annotated[int, Field(ge=1)]
    first_seed: Annotated[int, Field(ge=0, lt=2**63)]
    """Of the candidates; the others followed on."""
    judge: Annotated[str, Field(max_length=100)]
    likeness: float | None
    prompt: float | None


class _Stored(BaseModel):
    """The JSON of the `fastface` chunk."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    schema_: Annotated[int, Field(alias="schema")]
    versions: dict[str, str]
    recipe: dict[str, Any]
    prompt: str
    negative_prompt: str | None
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    adapter_scale: float
    identity: Annotated[str, Field(pattern=r"^[0-9a-f]{8,128}$")]
    unet_samples: Annotated[int, Field(ge=0)]
    best_of: BestOf | None = None
    lossy: dict[Annotated[str, Field(max_length=40)], bool | Annotated[str, Field(max_length=40)]] | None = (
        None
    )


@functools.cache
def installed_versions() -> dict[str, str]:
    """Installed versions of what decides the pixels; none of it is imported."""
    found = {"fastface": __version__}
    for name, distribution in PACKAGES.items():
        if name not in found:
            try:
                found[name] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                found[name] = "none"
    return found


def describe(
    recipe: Recipe,
    *,
    prompt: str,
    negative_prompt: str | None,
    seed: int,
    adapter_scale: float,
    identity_digest: str,
    unet_samples: int,
    versions: Mapping[str, str] | None = None,
    best_of: Mapping[str, Any] | None = None,
    lossy: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """The text chunks of one picture, by keyword, for `pictures.write_png`.

    Args:
        recipe: as resolved for this run.
        prompt: the picture's own.
        negative_prompt: None where zero embeddings stood in for it.
        seed: the picture's own.
        adapter_scale: the scale this picture was made with, which a sweep varies.
        identity_digest: hex digest that tells one person from another.
        unet_samples: how many samples went through the UNet.
        versions: None takes `installed_versions()`.
        best_of: the fields of `BestOf`, where the picture was chosen among several.
        lossy: items of speed that cost precision, as `Acceleration.lossy` tells them.

    Raises:
        UsageError: the description is longer than any reader would accept.
    """
    made_by = dict(versions) if versions is not None else installed_versions()
    stored = {
        "schema": SCHEMA,
        "versions": made_by,
        "recipe": _shareable(recipe),
        "prompt": _text(prompt),
        "negative_prompt": None if negative_prompt is None else _text(negative_prompt),
        "seed": seed,
        "adapter_scale": adapter_scale,
        "identity": identity_digest,
        "unet_samples": unet_samples,
        **({"best_of": dict(best_of)} if best_of else {}),
        **({"lossy": dict(lossy)} if lossy else {}),
    }
    # Escaped to ASCII: every PNG reader and every encoding agrees on it.
    data = json.dumps(stored, sort_keys=True)
    if len(data) > MAX_TEXT:
        raise UsageError(
            f"prompt and recipe make {len(data)} characters of metadata, more than the {MAX_TEXT} a picture "
            "carries",
            "shorten the prompt, or give --no-metadata",
        )
    name = f"fastface {made_by.get('fastface', __version__)}"
    return {
        "parameters": _parameters(
            recipe,
            prompt=_text(prompt),
            negative_prompt=_text(negative_prompt or ""),
            seed=seed,
            adapter_scale=adapter_scale,
            identity_digest=identity_digest,
            made_by=name,
            best_of=best_of["count"] if best_of else 1,
        ),
        KEYWORD: data,
        **marker(name),
    }


def describe_made(
    recipe: Recipe, picture: Picture, *, best_of: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """`describe` of a picture that a pipeline made."""
    request = picture.request
    return describe(
        recipe,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        seed=request.seed,
        adapter_scale=picture.adapter_scale,
        identity_digest=request.identity.digest(),
        unet_samples=picture.unet_samples,
        best_of=best_of,
        lossy=picture.lossy,
    )


def marker(made_by: str = f"fastface {__version__}") -> dict[str, str]:
    """The text chunk that says a picture was generated, and by what: all that a contact sheet carries."""
    return {"XML:com.adobe.xmp": _xmp(made_by)}


def _text(value: str) -> str:
    """Without lone surrogates (bytes of an argument that were not UTF-8), which no text format can hold."""
    return value.encode("utf-8", "replace").decode()


def _parameters(
    recipe: Recipe,
    *,
    prompt: str,
    negative_prompt: str,
    seed: int,
    adapter_scale: float,
    identity_digest: str,
    made_by: str,
    best_of: int,
) -> str:
    """Prompt, negative prompt, and one line of `Name: value` pairs, as stable-diffusion-webui writes them."""
    sampling, guidance, scheduler = recipe.sampling, recipe.guidance, recipe.model.scheduler
    pairs: dict[str, str] = {
        "Steps": str(sampling.steps),
        "Sampler": " ".join(filter(None, (_SAMPLERS[scheduler.kind], scheduler.spacing))),
    }
    if guidance.identity == guidance.text and isinstance(guidance.text, int | float):
        # Equal constants are ordinary classifier-free guidance; anything else has no such number.
        pairs["CFG scale"] = f"{guidance.text:g}"
    pairs |= {
        "Seed": str(seed),
        "Size": f"{sampling.width}x{sampling.height}",
        "Model": _leaf(recipe.name),
        "Identity guidance": _weight(guidance.identity),
        "Text guidance": _weight(guidance.text),
        "Adapter scale": f"{adapter_scale:g}",
        "Identity": identity_digest[:12],
        **({"Best of": str(best_of)} if best_of > 1 else {}),
        "Version": made_by,
    }
    lines = [_printable(prompt)]
    if negative_prompt:
        lines.append(f"Negative prompt: {_printable(negative_prompt)}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items()))
    return "\n".join(lines)


def _printable(text: str) -> str:
    """A text chunk may hold line feeds but no other control character."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f]", " ", text.replace("\r\n", "\n").replace("\r", "\n"))


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n\"]", value) else value


def _weight(weight: Weight) -> str:
    if isinstance(weight, WeightFunction):
        return f"{'inverse ' if weight.inverse else ''}{weight.function} {weight.scale:g}"
    return ", ".join(f"{number:g}" for number in weight) if isinstance(weight, list) else f"{weight:g}"


def _xmp(made_by: str) -> str:
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about=""'
        ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
        ' xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
        f' Iptc4xmpExt:DigitalSourceType="{_SOURCE_TYPE}"'
        f" xmp:CreatorTool={quoteattr(made_by)}/>"
        '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )


def _shareable(recipe: Recipe) -> dict[str, Any]:
    """The canonical recipe, each local path replaced by its file name and a mark of its content."""

    def hide(_field: str, reference: Any) -> Any:
        if not isinstance(reference, str) or _public(reference):
            return reference
        return {"local": _leaf(reference), "mark": content_mark(Path(reference).expanduser())}

    data = recipe.canonical()
    return {**data, "name": _leaf(recipe.name), "model": _map_references(data["model"], hide)}


def _public(reference: str) -> bool:
    """A name of the manifest or a pinned Hub file: the same everywhere. Anything else is a path."""
    return reference in load_manifest() or reference.startswith("hub:")


def _leaf(path: str) -> str:
    """The last part of a path of any system."""
    name = PureWindowsPath(path).name
    return name if name.strip(".") else "local"


def _map_references(model: dict[str, Any], change: Callable[[str, Any], Any]) -> dict[str, Any]:
    """`change(field, reference)` for every reference in the plain data of `Recipe.model`."""

    def by_step(field: str, value: Any) -> Any:
        if isinstance(value, dict) and value and all(str(key).isdigit() for key in value):
            return {key: change(f"{field}.{key}", reference) for key, reference in value.items()}
        return change(field, value)

    changed = {
        key: by_step(f"model.{key}", value) if key not in ("loras", "scheduler") else value
        for key, value in model.items()
    }
    loras, scheduler = model.get("loras"), model.get("scheduler")
    if isinstance(loras, list):
        changed["loras"] = [
            {**lora, "file": change(f"model.loras.{index}.file", lora["file"])}
            if isinstance(lora, dict) and "file" in lora
            else lora
            for index, lora in enumerate(loras)
        ]
    if isinstance(scheduler, dict) and "config" in scheduler:
        changed["scheduler"] = {
            **scheduler,
            "config": change("model.scheduler.config", scheduler["config"]),
        }
    return changed


def content_mark(path: Path) -> str | None:
    """A short mark that tells apart two versions of a local model, without reading gigabytes.

    SHA-256 (first 32 hex digits) over name, size and 16 evenly spaced blocks of 64 KiB of the file, or of
    each file in the folder; None where there is nothing to read.

    Args:
        path: a file or a folder.
    """
    mark = hashlib.sha256()
    try:
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        for file in files:
            size = file.stat().st_size
            name = "" if file == path else file.relative_to(path).as_posix()
            mark.update(f"{name}\0{size}\0".encode())
            with file.open("rb") as stream:
                for block in range(16):
                    stream.seek(block * max(size - 65536, 0) // 15)
                    mark.update(stream.read(65536))
    except OSError:
        return None
    return mark.hexdigest()[:32] if files else None


def read(path: Path) -> Provenance:
    """How a picture says it was made.

    Args:
        path: a PNG written by fastface; it is not trusted.

    Raises:
        UsageError: not a PNG, no such text, or text that is malformed, foreign, too long or of a newer
            version.
    """
    text = _chunk(path)
    if text is None:
        raise UsageError(
            f"{path} does not say how it was made",
            "it was written with --no-metadata, by another program, or an editor dropped the text; "
            "give --recipe and --prompt instead",
        )
    if len(text) > MAX_TEXT:
        raise UsageError(f"the metadata of {path} is longer than the {MAX_TEXT} characters that are read")
    try:
        data = json.loads(text, parse_constant=_no_constant)
        if not isinstance(data, dict):
            raise ValueError("not an object")
        schema = data.get("schema")
        if type(schema) is int and schema > SCHEMA:
            raise UsageError(
                f"{path} was written by a newer fastface (metadata schema {schema}; this one reads {SCHEMA})",
                "upgrade fastface",
            )
        if schema != SCHEMA:
            raise ValueError(f"unknown schema {str(schema)[:40]!r}")
        stored = _Stored.model_validate_json(json.dumps(data))
        return _provenance(stored)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(map(str, first["loc"]))[:80] or first.get("ctx", {}).get("field", "")
        raise _malformed(path, f"{place}: {first['msg'][:200]}") from error
    except (ValueError, RecursionError) as error:
        raise _malformed(path, str(error)[:200]) from error


def _malformed(path: Path, problem: str) -> UsageError:
    return UsageError(
        f"the metadata of {path} is malformed ({' '.join(problem.split())})",
        "give --recipe and --prompt instead",
    )


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _provenance(stored: _Stored) -> Provenance:
    found: list[LocalPart] = []

    def show(field: str, reference: Any) -> Any:
        if isinstance(reference, str) and not _public(reference):
            # Never a path from a picture: a file of this machine is opened only where its user names it.
            raise ValueError(f"{field}: there is no model called '{reference[:80]}'")
        if not (isinstance(reference, dict) and "local" in reference):
            return reference
        name, mark = reference["local"], reference.get("mark")
        if not (isinstance(name, str) and name and name == _leaf(name) and isinstance(mark, str | None)):
            raise ValueError(f"{field}: a local file without a plain name")
        found.append(LocalPart(field, name, mark))
        return f"local:{name}"

    model = stored.recipe.get("model")
    if not isinstance(model, dict):
        raise ValueError("recipe.model: missing")
    plain = {**stored.recipe, "model": _map_references(model, show)}
    recipe = Recipe.model_validate_json(json.dumps(plain))
    other_steps = {
        f"model.{part}.{step}"
        for part in ("unet", "distillation")
        if isinstance(by_step := getattr(recipe.model, part), dict)
        for step in by_step
        if step != recipe.sampling.steps
    }
    return Provenance(
        recipe=recipe,
        prompt=stored.prompt,
        negative_prompt=stored.negative_prompt,
        seed=stored.seed,
        adapter_scale=stored.adapter_scale,
        identity_digest=stored.identity,
        unet_samples=stored.unet_samples,
        versions=stored.versions,
        local_parts=tuple(part for part in found if part.field not in other_steps),
        best_of=stored.best_of,
        lossy=stored.lossy,
    )


def _chunk(path: Path) -> str | None:
    """The `fastface` text of a PNG; Pillow bounds what a compressed chunk may inflate to."""
    from PIL import Image, UnidentifiedImageError

    try:
        if not path.is_file():
            told = f"{path} is not a file" if path.exists() else f"there is no picture {path}"
            raise UsageError(told, "--from takes a PNG that fastface made")
        if path.stat().st_size > MAX_FILE:
            raise UsageError(f"{path} is too large for a picture of fastface")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG"]) as image:
                if KEYWORD not in image.info:
                    image.load()  # an editor may have moved the text behind the pixels
                text = image.info.get(KEYWORD)
    except UnidentifiedImageError as error:
        raise UsageError(f"{path} is not a PNG", "only pictures made by fastface can be replayed") from error
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        zlib.error,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise UsageError(f"cannot read {path}: {error}", "is the file whole?") from error
    return text if isinstance(text, str) else None
