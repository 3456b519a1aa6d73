"""Artifacts: which there are, where each comes from, and what a reference in a recipe means."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from ..errors import RecipeError, nearest
from ..recipe.schema import HubReference, ModelReference

PACKAGE = Path(__file__).parents[1]
MANIFEST = Path(__file__).with_name("manifest.yaml")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".onnx")
_HUB = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})(?::(?P<file>.+))?")


@dataclass(frozen=True)
class RemoteFile:
    """One file of an artifact.

    Args:
        path: path inside the repository, with forward slashes.
        bytes: exact size, or None where it is not known before the first download.
        sha256: 64 hex digits, or None where the publisher's own hash at the first download decides.
        approx_bytes: a size for tables, where `bytes` is None.
    """

    path: str
    bytes: int | None = None
    sha256: str | None = None
    approx_bytes: int | None = None

    @property
    def expected_bytes(self) -> int:
        """The size to plan with; 0 where nothing is known."""
        return self.bytes if self.bytes is not None else self.approx_bytes or 0


@dataclass(frozen=True)
class Artifact:
    """One model part, from exactly one of a Hub repository, a URL, or a place on this machine.

    Args:
        name: name in recipes; for others the reference itself.
        kind: base, unet, lora, vae, adapter, image_encoder, scheduler, face, scorer, recognizer, ...
        files: what must be fetched; empty for a place on this machine, and for a Hub folder whose
            listing has not been read yet (`whole`).
        commercial: yes, no or unclear; `commercial_note` says why.
        root: what the store's `path` points at, inside the snapshot; None: the snapshot folder, or the
            file itself where there is exactly one.
        folder: for `whole`, the folder of the repository that is wanted; empty is all of it.
        archive: URL of a zip that holds the same files, tried when the repository cannot be had.
    """

    name: str
    kind: str
    summary: str
    files: tuple[RemoteFile, ...] = ()
    license: str = "unknown"
    license_link: str = ""
    commercial: str = "unclear"
    commercial_note: str = ""
    repo: str | None = None
    commit: str | None = None
    root: str | None = None
    whole: bool = False
    folder: str = ""
    url: str | None = None
    archive: str | None = None
    local: Path | None = None
    packaged: bool = False

    @property
    def bytes(self) -> int:
        """Total size in bytes; approximate where a file's exact size is not known."""
        return sum(file.expected_bytes for file in self.files)

    @property
    def page(self) -> str:
        """Where a person reads about it and accepts its terms."""
        return f"https://huggingface.co/{self.repo}" if self.repo else self.license_link or self.url or ""


def parse_manifest(text: str) -> Mapping[str, Artifact]:
    """Artifacts by name from the text of a manifest (its form: the head of `manifest.yaml`).

    Raises:
        ValueError: the manifest is not well-formed.
    """
    data = yaml.load(text, Loader=yaml.BaseLoader)
    found: dict[str, Artifact] = {}
    for entry in data["artifacts"]:
        artifact = _artifact(dict(entry), data["licenses"])
        if artifact.name in found:
            raise ValueError(f"the manifest names {artifact.name} twice")
        found[artifact.name] = artifact
    return MappingProxyType(found)


@functools.cache
def load_manifest() -> Mapping[str, Artifact]:
    """The artifacts that ship with this version, by name."""
    return parse_manifest(MANIFEST.read_text(encoding="utf-8"))


def resolve(reference: ModelReference, known: Mapping[str, Artifact] | None = None) -> Artifact:
    """The artifact that a recipe's reference means.

    A name of the manifest; `hub:owner/name@<40 hex>[:file or folder]` (or a HubReference); or a path of this
    machine: whatever starts with `/`, `~` or `.`, ends like a weight file, or exists. A path need not
    exist yet: the store says so when the file is needed.

    Args:
        reference: what the recipe says.
        known: the manifest; None is the one that ships.

    Raises:
        RecipeError: none of these; names the nearest valid name.
    """
    names = load_manifest() if known is None else known
    if isinstance(reference, HubReference):
        return _from_hub(reference.repo, reference.commit, reference.file, names)
    if reference in names:
        return names[reference]
    if reference.startswith("hub:"):
        match = _HUB.fullmatch(reference)
        if match is None:
            raise RecipeError(
                f"'{reference}' is not a pinned Hub reference",
                "write hub:owner/name@<40 hex digits of the commit>:path/of/the/file",
            )
        return _from_hub(match["repo"], match["commit"], match["file"], names)
    if _is_path(reference):
        return Artifact(
            name=reference,
            kind="local",
            summary="a file or folder of this machine",
            license="yours",
            local=Path(reference).expanduser(),
        )
    near = nearest(reference, names)
    raise RecipeError(
        f"there is no model called '{reference}'",
        (f"did you mean '{near}'? " if near else "")
        + "a path starts with './' or '/', a Hub file is hub:owner/name@commit:file",
    )


def _is_path(reference: str) -> bool:
    return (
        reference.startswith(("/", "~", "."))
        or reference.lower().endswith(WEIGHT_SUFFIXES)
        or re.match(r"[A-Za-z]:[\\/]", reference) is not None
        or Path(reference).exists()
    )


def _from_hub(repo: str, commit: str, file: str | None, names: Mapping[str, Artifact]) -> Artifact:
    """A Hub reference; a file that the manifest knows keeps its hash and license."""
    name = f"hub:{repo}@{commit}" + (f":{file}" if file else "")
    relatives = [one for one in names.values() if one.repo == repo]
    terms = (
        {
            key: getattr(relatives[0], key)
            for key in ("license", "license_link", "commercial", "commercial_note")
        }
        if relatives
        else {"license": "see its page", "license_link": f"https://huggingface.co/{repo}"}
    )
    single = file is not None and file.lower().endswith((*WEIGHT_SUFFIXES, ".json"))
    files: tuple[RemoteFile, ...] = ()
    if single and file is not None:
        pinned = [
            known for one in relatives if one.commit == commit for known in one.files if known.path == file
        ]
        files = (pinned[0] if pinned else RemoteFile(file),)
    return Artifact(
        name=name,
        kind="hub",
        summary=f"{file or 'all of it'} from {repo}",
        files=files,
        repo=repo,
        commit=commit,
        whole=not single,
        folder="" if single else (file or "").strip("/"),
        root=None if single else (file or "").strip("/"),
        **terms,
    )


def _artifact(entry: dict[str, Any], licenses: dict[str, list[str]]) -> Artifact:
    files = tuple(_file(*row) for row in entry.pop("files", []))
    license, link, commercial, note = licenses[entry.pop("license")]
    package = entry.pop("package", None)
    if package is not None:
        entry["local"] = PACKAGE / package
        entry["packaged"] = True
    artifact = Artifact(
        **entry,
        files=files,
        license=license,
        license_link=link,
        commercial=commercial,
        commercial_note=note,
    )
    where = f"artifact {artifact.name}"
    if sum(source is not None for source in (artifact.repo, artifact.url, artifact.local)) != 1:
        raise ValueError(f"{where} needs exactly one of repo, url and package")
    if artifact.repo and not re.fullmatch(r"[0-9a-f]{40}", artifact.commit or ""):
        raise ValueError(f"{where} needs a commit of 40 hex digits")
    if not files and artifact.local is None:
        raise ValueError(f"{where} names no file")
    return artifact


def _file(path: str, size: str, sha256: str) -> RemoteFile:
    if sha256 != "-" and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ValueError(f"{path}: '{sha256}' is not a SHA-256")
    approximate = size.startswith("~")
    return RemoteFile(
        path=path,
        bytes=None if approximate else int(size),
        sha256=None if sha256 == "-" else sha256,
        approx_bytes=int(size[1:]) if approximate else None,
    )


SDXL_FOLDERS = {"scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae"}
_WEIGHTS = (".safetensors", ".bin", ".onnx")
_TEXT = (".json", ".txt", ".model", ".jinja")


def whole_selection(paths: list[str], folder: str = "") -> list[str]:
    """The files of a repository worth fetching when a whole folder is asked for.

    In each folder one set of weights: safetensors before pickles before ONNX, the fp16 variant before full
    precision; of a diffusers pipeline the folders of SDXL only, and no single-file checkpoints beside them.

    Args:
        paths: every path of the repository.
        folder: the folder wanted; empty is all of it.
    """
    inside = [path for path in paths if not folder or path.startswith(folder + "/")]
    prefix = folder + "/" if folder else ""
    pipeline = prefix + "model_index.json" in inside
    weights: dict[str, list[str]] = {}
    chosen = []
    for path in inside:
        parent, _, name = path[len(prefix) :].rpartition("/")
        if pipeline and parent not in SDXL_FOLDERS and path != prefix + "model_index.json":
            continue
        if name.endswith(_TEXT) and not name.startswith("openvino"):
            chosen.append(path)
        elif name.endswith(_WEIGHTS) and not name.startswith(("flax", "openvino")):
            weights.setdefault(parent, []).append(path)
    for candidates in weights.values():
        safe = next(found for suffix in _WEIGHTS if (found := [p for p in candidates if p.endswith(suffix)]))
        half = [path for path in safe if ".fp16" in path.rsplit("/", 1)[-1]]
        plain = [path for path in safe if not re.search(r"\.(non_ema|ema|bf16|fp32)[.-]", path)]
        chosen += half or plain or safe
    return sorted(chosen)
