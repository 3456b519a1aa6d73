"""The metadata of an image: how it was made. `replay` reads it back.

A PNG has three text chunks: `parameters` (the lines that A1111-style viewers show), `fastface` (JSON with
everything that a replay needs except the photo) and an XMP packet that marks the image as generated (IPTC
digital source type). JPEG and WebP have only the packet, which then contains the other two. None contains
a path of this machine, the photo or the face embedding.
"""

from __future__ import annotations

import functools
import html
import importlib.metadata
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any
from xml.sax.saxutils import quoteattr

from pydantic import BaseModel, ConfigDict, Field, field_validator

from .. import __version__
from ..errors import UsageError
from ..files import content_mark
from ..recipe.schema import AdapterScale, Recipe, Weight, WeightFunction, scale_text
from ..store.manifest import load_manifest
from .images import XMP

SCHEMA = 1
"""Version of the JSON in `fastface`; readers refuse newer versions."""

KEYWORD = "fastface"
NAMESPACE = "https://fastface.invalid/ns/1.0/"
"""Name of the properties in XMP; it is not an address."""
MAX_TEXT = 1024 * 1024
"""Maximum characters of the JSON, for writing and reading."""

_PACKAGES = {
    "fastface": "fastface-cli",
    "torch": "torch",
    "diffusers": "diffusers",
    "transformers": "transformers",
}

_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_SAMPLERS = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "lcm": "LCM",
    "tcd": "TCD",
    "dpm_singlestep": "DPM++ singlestep",
}


@dataclass(frozen=True)
class LocalPart:
    """A model part that was a local file or folder on the machine that made the image."""

    field: str
    """Its field in the recipe: `model.base`, `model.loras.0.file`."""
    name: str
    """Its file name, without any folder."""
    mark: str | None
    """Its `content_mark`; None if it could not be read."""


class BestOf(BaseModel):
    """How an image was selected from several candidates."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    count: Annotated[int, Field(ge=1)]
    first_seed: Annotated[int, Field(ge=0, lt=2**63)]
    """Seed of the first candidate; the others follow."""
    judge: Annotated[str, Field(max_length=100)]
    likeness: float | None
    prompt: float | None


class Provenance(BaseModel):
    """How an image was made. Its JSON is the `fastface` chunk."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, populate_by_name=True
    )

    recipe: Recipe
    """As resolved for the run. After reading, parts in `local_parts` are `local:NAME`, which is no file."""
    prompt: str
    negative_prompt: str | None
    """None: zero embeddings were used."""
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    adapter_scale: AdapterScale
    """The scale of this image, which a sweep varies."""
    identity_digest: Annotated[
        str,
        Field(pattern=r"^[0-9a-f]{8,128}$", validation_alias="identity", serialization_alias="identity"),
    ]
    """See `Identity.digest`."""
    unet_samples: Annotated[int, Field(ge=0)]
    """Number of samples that the UNet processed."""
    versions: dict[str, str]
    """See `installed_versions`."""
    local_parts: Annotated[tuple[LocalPart, ...], Field(exclude=True)] = ()
    """Only after reading."""
    best_of: BestOf | None = None
    lossy: dict[Annotated[str, Field(max_length=40)], bool | Annotated[str, Field(max_length=40)]] | None = (
        None
    )
    """The lossy optimizations that were enabled, see `Acceleration.lossy`."""

    @field_validator("prompt", "negative_prompt", mode="before")
    @classmethod
    def _encodable(cls, value: Any) -> Any:
        """Replace lone surrogates (command-line bytes that are not UTF-8), which no text format supports."""
        return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value

    def as_run(self) -> Recipe:
        """The recipe with the prompt, negative prompt, seed and adapter scale of this image."""
        return self.recipe.model_copy(
            update={
                "prompt": self.prompt,
                "negative_prompt": self.negative_prompt,
                "seed": self.seed,
                "adapter": self.recipe.adapter.model_copy(update={"scale": self.adapter_scale}),
            }
        )

    def require_local_parts(self, given: Collection[str]) -> None:
        """Check that the user gives a path for every local file of the original run.

        Args:
            given: the fields that the user overrides (`model.base`, `model`).

        Raises:
            UsageError: a path is missing; the hint shows how to give it.
        """
        missing = [
            part
            for part in self.local_parts
            if not any(part.field == field or part.field.startswith(f"{field}.") for field in given)
        ]
        if missing:
            names = ", ".join(f"'{part.name}' as {part.field}" for part in missing)
            raise UsageError(
                f"this image was made with local files ({names}), and its metadata contains no paths",
                "add " + " ".join(f"--set {part.field}=PATH" for part in missing),
            )

    def changed_local_parts(self, recipe: Recipe) -> list[LocalPart]:
        """The local parts whose replacement in `recipe` has other content than the original.

        Args:
            recipe: this recipe, with paths for the local parts.
        """
        marks: dict[str, str | None] = {}

        def measure(field: str, reference: Any) -> Any:
            if isinstance(reference, str) and not is_public(reference):
                marks[field] = content_mark(Path(reference).expanduser())
            return reference

        map_references(recipe.canonical()["model"], measure)
        return [part for part in self.local_parts if part.mark and marks.get(part.field) != part.mark]


@functools.cache
def installed_versions() -> dict[str, str]:
    """Installed versions of the packages that determine the pixels, without importing them."""
    versions = {"fastface": __version__}
    for name, distribution in _PACKAGES.items():
        if name not in versions:
            try:
                versions[name] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = "none"
    return versions


def describe(provenance: Provenance, suffix: str = ".png") -> dict[str, str]:
    """Return the text chunks of an image, by keyword, for `images.write_image`.

    Args:
        provenance: how it was made.
        suffix: of the file; other formats than PNG have only the XMP packet.

    Raises:
        UsageError: the metadata is longer than readers accept.
    """
    stored = provenance.model_dump(mode="json", by_alias=True, exclude={"recipe"})
    for optional in ("best_of", "lossy"):
        if not stored[optional]:
            del stored[optional]
    # Escaped to ASCII, which every PNG reader decodes the same way.
    data = json.dumps({"schema": SCHEMA, **stored, "recipe": _shareable(provenance.recipe)}, sort_keys=True)
    if len(data) > MAX_TEXT:
        raise UsageError(
            f"prompt and recipe need {len(data)} characters of metadata, more than the limit of {MAX_TEXT}",
            "shorten the prompt, or use --no-metadata",
        )
    software = f"fastface {provenance.versions.get('fastface', __version__)}"
    parameters = _parameters(provenance, software)
    if suffix.lower() != ".png":
        return {XMP: _xmp(software, {"parameters": parameters, "run": data})}
    return {"parameters": parameters, KEYWORD: data, **marker(software)}


def marker(software: str = f"fastface {__version__}") -> dict[str, str]:
    """Return the text chunk that marks an image as generated, the only one of a contact sheet."""
    return {XMP: _xmp(software, {})}


def run_of_packet(packet: bytes) -> str | None:
    """The JSON in the XMP packet of a JPEG or WebP; None if it has none. The packet is not trusted."""
    match = re.search(rb'\sfastface:run=("[^"]*"|\'[^\']*\')', packet[: 4 * MAX_TEXT])
    return None if match is None else html.unescape(match[1][1:-1].decode("utf-8", "replace"))


def _parameters(provenance: Provenance, software: str) -> str:
    """Prompt, negative prompt, and one line of `Name: value` pairs, as stable-diffusion-webui writes them."""
    recipe = provenance.recipe
    sampling, guidance, scheduler = recipe.sampling, recipe.guidance, recipe.model.scheduler
    pairs: dict[str, str] = {
        "Steps": str(sampling.steps),
        "Sampler": " ".join(filter(None, (_SAMPLERS[scheduler.kind], scheduler.spacing))),
    }
    if guidance.identity == guidance.text and isinstance(guidance.text, int | float):
        # Equal constants are ordinary classifier-free guidance; other weights have no such number.
        pairs["CFG scale"] = f"{guidance.text:g}"
    pairs |= {
        "Seed": str(provenance.seed),
        "Size": f"{sampling.width}x{sampling.height}",
        "Model": file_name(recipe.name),
        "Identity guidance": _weight(guidance.identity),
        "Text guidance": _weight(guidance.text),
        "Adapter scale": scale_text(provenance.adapter_scale),
        "Identity": provenance.identity_digest[:12],
    }
    if provenance.best_of is not None and provenance.best_of.count > 1:
        pairs["Best of"] = str(provenance.best_of.count)
    pairs["Version"] = software
    lines = [_printable(provenance.prompt)]
    if provenance.negative_prompt:
        lines.append(f"Negative prompt: {_printable(provenance.negative_prompt)}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items()))
    return "\n".join(lines)


def _printable(text: str) -> str:
    """Replace control characters except line feeds, which text chunks do not allow."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f]", " ", text.replace("\r\n", "\n").replace("\r", "\n"))


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n\"]", value) else value


def _weight(weight: Weight) -> str:
    if isinstance(weight, WeightFunction):
        return f"{'inverse ' if weight.inverse else ''}{weight.function} {weight.scale:g}"
    return ", ".join(f"{number:g}" for number in weight) if isinstance(weight, list) else f"{weight:g}"


def _xmp(software: str, own: Mapping[str, str]) -> str:
    """The XMP packet, with properties in the namespace of fastface."""
    properties = "".join(f" fastface:{name}={quoteattr(value)}" for name, value in own.items())
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about=""'
        ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
        ' xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
        f' Iptc4xmpExt:DigitalSourceType="{_SOURCE_TYPE}"'
        f' xmlns:fastface="{NAMESPACE}"'
        f" xmp:CreatorTool={quoteattr(software)}{properties}/>"
        '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )


def _shareable(recipe: Recipe) -> dict[str, Any]:
    """The canonical recipe, with each local path replaced by its file name and content mark."""

    def hide(_field: str, reference: Any) -> Any:
        if not isinstance(reference, str) or is_public(reference):
            return reference
        return {"local": file_name(reference), "mark": content_mark(Path(reference).expanduser())}

    data = recipe.canonical()
    return {**data, "name": file_name(recipe.name), "model": map_references(data["model"], hide)}


def is_public(reference: str) -> bool:
    """Whether a reference is a name in the manifest or a pinned Hub file. Others are paths."""
    return reference in load_manifest() or reference.startswith("hub:")


def file_name(path: str) -> str:
    """The file name of a path of any operating system."""
    name = PureWindowsPath(path).name
    return name if name.strip(".") else "local"


def map_references(model: dict[str, Any], change: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Apply `change(field, reference)` to every reference in the plain data of `Recipe.model`."""

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
