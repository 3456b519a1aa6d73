"""Data sets: people and prompts. Three forms on disk are read into one `Dataset`.

- the published layout: a folder with `id_photos/`, `prompts.txt` and its `realistic` and `style` halves;
- a folder with one photo per person, and prompts in its `prompts.txt` or in a separate file;
- a JSONL manifest with one person per line: several photos, a held-out photo, free attribute columns:

    {"identity": "ann", "photos": ["ann/1.jpg", "ann/2.jpg"], "held_out": "ann/3.jpg", "light": "dim"}
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ..app.jobs import prompts_file
from ..errors import UsageError, nearest
from ..identity.photos import SUFFIXES
from .stress import STRESSES

Split = Literal["full", "realistic", "style"]
SPLITS: tuple[Split, ...] = get_args(Split)
PROMPTS: dict[Split, str] = {
    "full": "prompts.txt",
    "realistic": "prompts_nostyle.txt",
    "style": "prompts_style.txt",
}
PHOTOS = "id_photos"
LONGEST = 110
"""Maximum bytes of the name of a person or a recipe: files are called RECIPE~PERSON~PROMPT-SEED.npz."""
_RESERVED = ("identity", "photos", "held_out")
_ENDINGS = ("+held-out", *(f"+{stress}" for stress in STRESSES))
"""Suffixes that a run adds to names of further photos of a person; names with them are ambiguous."""


@dataclass(frozen=True)
class Subject:
    """A person of the data set."""

    name: str
    photos: tuple[Path, ...]
    """Photos that condition generation; the first one is the reference for scores."""
    held_out: Path | None = None
    """A photo that is used for scores only, not for conditioning."""
    attributes: dict[str, str] = field(default_factory=dict)
    """Free columns, for breakdowns by attribute."""


@dataclass(frozen=True)
class Dataset:
    """People and prompts; every person is combined with every prompt."""

    name: str
    subjects: tuple[Subject, ...]
    """Sorted by name."""
    prompts: tuple[str, ...]
    """As written, or lower-cased under the published protocol."""
    hash: str
    """SHA-256 of names, attributes, the bytes of every photo, and the prompts in their order."""
    marks: dict[str, str]
    """Short SHA-256 of each person's photos and attributes, to report which person has changed."""

    def record(self) -> dict[str, Any]:
        """Return what `run.json` records of the data set."""
        return {
            "name": self.name,
            "hash": self.hash,
            "identities": [subject.name for subject in self.subjects],
            "marks": self.marks,
            "prompts": list(self.prompts),
        }


def load_dataset(
    path: Path, *, prompts: Path | None = None, split: Split = "full", lower: bool = False
) -> Dataset:
    """Read a data set. Photos are hashed, not decoded: a broken photo only fails its own images.

    Args:
        path: a folder or a JSONL manifest.
        prompts: a file that replaces the prompts of the data set.
        split: prompt set of the published layout.
        lower: lower-case the prompts, as the published protocol does.

    Raises:
        UsageError: no such data set, no photos, no prompts, or an invalid manifest line.
    """
    if path.is_dir():
        subjects = _photos(path / PHOTOS if (path / PHOTOS).is_dir() else path)
        folder = path
    elif path.is_file():
        subjects = _manifest(path)
        folder = path.parent
    else:
        raise UsageError(
            f"data set not found: {path}",
            "give a folder with id_photos/ and prompts.txt, a folder of photos, or a JSONL manifest; "
            "download the published one with `fastface download diversefaces`",
        )
    texts = _prompts(folder, prompts, split)
    if lower:
        texts = [text.lower() for text in texts]
    subjects = sorted(subjects, key=lambda subject: subject.name)
    _check_names(subjects, path)
    contents = [_content(subject) for subject in subjects]
    return Dataset(
        path.resolve().stem,
        tuple(subjects),
        tuple(texts),
        _hash({"subjects": contents, "prompts": texts}),
        {subject.name: _hash(content)[:16] for subject, content in zip(subjects, contents, strict=True)},
    )


def _photos(folder: Path) -> list[Subject]:
    """Return one person per photo, named after the file."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()]
    files = [file for file in files if not file.name.startswith(".")]
    if not files:
        raise UsageError(f"no photos in {folder}", f"photos end in {', '.join(SUFFIXES)}")
    return [Subject(file.stem, (file,)) for file in files]


def _prompts(folder: Path, given: Path | None, split: Split) -> list[str]:
    if given is not None:
        if split != "full":
            raise UsageError("--split selects prompts of the data set", "omit --prompts or --split")
        return prompts_file(given)
    file = folder / PROMPTS[split]
    if not file.is_file():
        raise UsageError(
            f"the data set has no {file.name} in {folder}",
            "pass one prompt per line: --prompts FILE",
        )
    return prompts_file(file)


def _manifest(path: Path) -> list[Subject]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read the manifest {path}: {error}", "a manifest is JSON lines in UTF-8"
        ) from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    subjects = [
        _subject(line, f"{path}:{number}", path.parent)
        for number, line in lines
        if line and not line.startswith("#")
    ]
    if not subjects:
        raise UsageError(
            f"the manifest {path} has no people", 'a line is {"identity": "ann", "photos": [...]}'
        )
    return subjects


def _subject(line: str, where: str, folder: Path) -> Subject:
    try:
        data = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{where}: invalid JSON: {error}", "write one JSON object per line") from error
    if not isinstance(data, dict):
        raise UsageError(f"{where}: not a JSON object", 'a line is {"identity": "ann", "photos": [...]}')
    photos = data.get("photos")
    photos = [photos] if isinstance(photos, str) else photos
    if not isinstance(photos, list) or not photos or not all(isinstance(photo, str) for photo in photos):
        near = nearest("photos", [name for name in data if name not in _RESERVED])
        raise UsageError(
            f"{where}: 'photos' must be one or several paths",
            f"did you mean 'photos' instead of '{near}'?"
            if near
            else 'for example "photos": ["ann/1.jpg", "ann/2.jpg"]',
        )
    name, held_out = data.get("identity", Path(photos[0]).stem), data.get("held_out")
    if not isinstance(name, str) or not (held_out is None or isinstance(held_out, str)):
        raise UsageError(
            f"{where}: 'identity' and 'held_out' must be strings", "use a name and the path of a photo"
        )
    return Subject(
        name,
        tuple(folder / photo for photo in photos),
        None if held_out is None else folder / held_out,
        {key: _attribute(value, key, where) for key, value in data.items() if key not in _RESERVED},
    )


def _attribute(value: Any, key: str, where: str) -> str:
    if isinstance(value, str | int | float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    raise UsageError(
        f"{where}: the attribute '{key[:80]}' must be a string or a number", "convert or remove it"
    )


def _check_names(subjects: Iterable[Subject], path: Path) -> None:
    """Refuse names that are no valid folders, or that some file systems treat as equal."""
    seen: dict[str, str] = {}
    for subject in subjects:
        name = subject.name
        if not names_a_folder(name):
            raise UsageError(
                f"{path}: {name[:80]!r} is not a valid name",
                f"names are used as folder names, of at most {LONGEST} bytes",
            )
        if name.endswith(_ENDINGS):
            raise UsageError(
                f"{path}: '{name}' is not a valid name",
                f"names must not end in '{name[name.rindex('+') :]}', which marks further photos in a run",
            )
        # Some file systems ignore case, some store accents in another form.
        folded = unicodedata.normalize("NFC", name.casefold())
        twin = seen.get(folded)
        if twin is not None:
            raise UsageError(
                f"{path}: two people are called '{name}'" + ("" if twin == name else f" or '{twin}'"),
                "use one line (or one photo) per person; list several photos in 'photos'",
            )
        seen[folded] = name


def names_a_folder(name: str) -> bool:
    """Whether every file system keeps the name unchanged: Windows drops trailing dots and spaces, file names
    in old encodings are not valid Unicode, and a run adds to the name for its vectors."""
    plain = all(ord(letter) >= 32 and letter not in '/\\:*?"<>|' for letter in name)
    if not (plain and name == name.strip().rstrip(".") != "" and name.isprintable()):
        return False
    return len(name.encode()) <= LONGEST


def _content(subject: Subject) -> list[Any]:
    return [
        subject.name,
        [file_hash(photo) for photo in subject.photos],
        file_hash(subject.held_out) if subject.held_out else None,
        subject.attributes,
    ]


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str | None:
    """Return the SHA-256 (hex) of a file; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
