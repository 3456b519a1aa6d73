"""The manifest of artifacts and their sources, and the resolution of references in recipes."""

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
REPOSITORY = r"(?![\w./-]*(?:--|\.\.))\w[\w.-]*/\w[\w.-]*(?<![.-])(?<!\.git)"
"""Pattern of `owner/name`, as the Hub names repositories."""
_HUB = re.compile(rf"hub:(?P<repo>{REPOSITORY})@(?P<commit>[0-9a-f]{{40}})(?::(?P<file>.+))?", re.ASCII)


@dataclass(frozen=True)
class RemoteFile:
    """One file of an artifact.

    Args:
        path: path inside the repository, with forward slashes.
        bytes: exact size, or None if it is not known before the first download.
        sha256: 64 hex digits, or None to trust the publisher's hash at the first download.
        approx_bytes: approximate size for tables, if `bytes` is None.
    """

    path: str
    bytes: int | None = None
    sha256: str | None = None
    approx_bytes: int | None = None

    @property
    def expected_bytes(self) -> int:
        """Exact or approximate size; 0 if unknown."""
        return self.bytes if self.bytes is not None else self.approx_bytes or 0


@dataclass(frozen=True)
class Artifact:
    """One model part, from exactly one of a Hub repository, a URL, or a local path.

    Args:
        name: name in recipes; for Hub references and local paths, the reference itself.
        kind: base, unet, lora, vae, adapter, image_encoder, scheduler, face, scorer, recognizer, ...
        files: files to fetch; empty for a local path, and for a Hub folder whose listing has not been
            read yet (`whole`).
        commercial: yes, no or unclear; `commercial_note` gives the reason.
        root: path inside the snapshot that `Store.path` returns; None: the snapshot folder, or the
            file itself if there is exactly one.
        whole: the files are those of an entire Hub folder.
        folder: for `whole`, the folder of the repository; empty means the entire repository.
        archive: URL of a zip with the same files, used if the repository is unavailable.
        fallback: another commit with the same files, used for files with a hash if the first is not found.
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
    fallback: str | None = None
    local: Path | None = None
    packaged: bool = False

    @property
    def bytes(self) -> int:
        """Total size in bytes; approximate if the exact size of a file is not known."""
        return sum(file.expected_bytes for file in self.files)

    @property
    def page(self) -> str:
        """URL of the web page with its description and terms."""
        return f"https://huggingface.co/{self.repo}" if self.repo else self.license_link or self.url or ""


def parse_manifest(text: str) -> Mapping[str, Artifact]:
    """Parse a manifest into artifacts by name. The head of `manifest.yaml` documents the format.

    Raises:
        ValueError: the manifest is not well-formed.
    """
    data = yaml.load(text, Loader=yaml.BaseLoader)
    artifacts: dict[str, Artifact] = {}
    for entry in data["artifacts"]:
        artifact = _artifact(dict(entry), data["licenses"])
        if artifact.name in artifacts:
            raise ValueError(f"the manifest names {artifact.name} twice")
        artifacts[artifact.name] = artifact
    return MappingProxyType(artifacts)


@functools.cache
def load_manifest() -> Mapping[str, Artifact]:
    """The artifacts of the packaged manifest, by name."""
    return parse_manifest(MANIFEST.read_text(encoding="utf-8"))


def resolve(reference: ModelReference, known: Mapping[str, Artifact] | None = None) -> Artifact:
    """Resolve a reference of a recipe to an artifact.

    A reference is a name in the manifest; `hub:owner/name@<40 hex>[:file or folder]` (or a HubReference);
    or a local path: it starts with `/`, `~` or `.`, has the suffix of a weight file, or exists. A path need
    not exist yet: the store reports a missing file when it is needed.

    Args:
        reference: the value in the recipe.
        known: the manifest; None is the packaged manifest.

    Raises:
        RecipeError: none of these; suggests the nearest valid name.
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
            summary="a local file or folder",
            license="yours",
            local=Path(reference).expanduser(),
        )
    near = nearest(reference, names)
    raise RecipeError(
        f"there is no model called '{reference}'",
        (f"did you mean '{near}'? " if near else "")
        + "a local path starts with './' or '/'; a Hub file is hub:owner/name@commit:file",
    )


def _is_path(reference: str) -> bool:
    return (
        reference.startswith(("/", "~", "."))
        or reference.lower().endswith(WEIGHT_SUFFIXES)
        or re.match(r"[A-Za-z]:[\\/]", reference) is not None
        or Path(reference).exists()
    )


def _from_hub(repo: str, commit: str, file: str | None, names: Mapping[str, Artifact]) -> Artifact:
    """The artifact of a Hub reference; a file in the manifest keeps its hash and license."""
    if re.fullmatch(REPOSITORY, repo, re.ASCII) is None:
        raise RecipeError(f"'{repo}' is not a repository of the Hugging Face Hub", "write owner/name")
    name = f"hub:{repo}@{commit}" + (f":{file}" if file else "")
    related = [artifact for artifact in names.values() if artifact.repo == repo]
    terms = (
        {
            key: getattr(related[0], key)
            for key in ("license", "license_link", "commercial", "commercial_note")
        }
        if related
        else {"license": "see its web page", "license_link": f"https://huggingface.co/{repo}"}
    )
    single = file is not None and file.lower().endswith((*WEIGHT_SUFFIXES, ".json"))
    files: tuple[RemoteFile, ...] = ()
    if single and file is not None:
        pinned = [
            known
            for artifact in related
            if artifact.commit == commit
            for known in artifact.files
            if known.path == file
        ]
        files = (pinned[0] if pinned else RemoteFile(file),)
    return Artifact(
        name=name,
        kind="hub",
        summary=f"{file or 'all files'} from {repo}",
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
    commits = (artifact.commit or "", artifact.fallback or "0" * 40)
    if artifact.repo and not all(re.fullmatch(r"[0-9a-f]{40}", commit) for commit in commits):
        raise ValueError(f"{where} needs a commit of 40 hex digits")
    if not files and artifact.local is None:
        raise ValueError(f"{where} has no files")
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
    """Select the files to fetch for a reference to an entire folder.

    Each folder contributes one set of weights: safetensors before pickles before ONNX, the fp16 variant
    before full precision. A diffusers pipeline contributes only the SDXL folders, without single-file
    checkpoints.

    Args:
        paths: every path of the repository.
        folder: the folder to fetch; empty means the entire repository.
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
        preferred = next(
            matches
            for suffix in _WEIGHTS
            if (matches := [path for path in candidates if path.endswith(suffix)])
        )
        half = [path for path in preferred if ".fp16" in path.rsplit("/", 1)[-1]]
        plain = [path for path in preferred if not re.search(r"\.(non_ema|ema|bf16|fp32)[.-]", path)]
        chosen += half or plain or preferred
    return sorted(chosen)
