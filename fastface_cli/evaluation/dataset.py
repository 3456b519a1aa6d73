"""Data sets: who, and which prompts. Three forms on disk become one `Dataset`.

- the published layout: a folder with `id_photos/`, `prompts.txt` and its `realistic` and `style` halves;
- a folder of photos, one a person, with `prompts.txt` in it or a prompts file of one's own;
- a JSONL manifest, one person a line: several photos, a held-out photo, free attribute columns:

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
from .stress import STRESSES

Split = Literal["full", "realistic", "style"]
SPLITS: tuple[Split, ...] = get_args(Split)
PROMPTS: dict[Split, str] = {
    "full": "prompts.txt",
    "realistic": "prompts_nostyle.txt",
    "style": "prompts_style.txt",
}
PHOTOS = "id_photos"
PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_RESERVED = ("identity", "photos", "held_out")
_ENDINGS = ("+held-out", *(f"+{stress}" for stress in STRESSES))
"""What a run adds to a name for a person's other photos: a name that ends so could be taken for them."""


@dataclass(frozen=True)
class Subject:
    """A person of the data set."""

    name: str
    photos: tuple[Path, ...]
    """They condition; the first one is scored against."""
    held_out: Path | None = None
    """A photo that scores and does not condition."""
    attributes: dict[str, str] = field(default_factory=dict)
    """Free columns, for tables by attribute."""


@dataclass(frozen=True)
class Dataset:
    """People and prompts; every person meets every prompt."""

    name: str
    subjects: tuple[Subject, ...]
    """Sorted by name."""
    prompts: tuple[str, ...]
    """As written (or lower-cased, where the published protocol is followed)."""
    hash: str
    """SHA-256 of names, attributes, the bytes of every photo, and the prompts in their order."""
    marks: dict[str, str]
    """The beginning of a SHA-256 of each person's photos and attributes, so that a change can be named."""

    def record(self) -> dict[str, Any]:
        """What `run.json` says of it."""
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
    """Read a data set; photos are hashed and not decoded: a broken one spoils its own images alone.

    Args:
        path: a folder or a JSONL manifest.
        prompts: a prompts file in place of the data set's own.
        split: which prompts of the published layout.
        lower: lower-case the prompts, as the published protocol does.

    Raises:
        UsageError: no such data set, no photos, no prompts, or a wrong line of the manifest.
    """
    if path.is_dir():
        subjects = _photos(path / PHOTOS if (path / PHOTOS).is_dir() else path)
        folder = path
    elif path.is_file():
        subjects = _manifest(path)
        folder = path.parent
    else:
        raise UsageError(
            f"there is no data set {path}",
            "give a folder with id_photos/ and prompts.txt, a folder of photos, or a JSONL manifest; "
            "`fastface download diversefaces` fetches the published one",
        )
    texts = _prompts(folder, prompts, split)
    if lower:
        texts = [text.lower() for text in texts]
    subjects = sorted(subjects, key=lambda subject: subject.name)
    _check_names(subjects, path)
    people = [_content(subject) for subject in subjects]
    return Dataset(
        path.resolve().stem,
        tuple(subjects),
        tuple(texts),
        _hash({"subjects": people, "prompts": texts}),
        {subject.name: _hash(one)[:16] for subject, one in zip(subjects, people, strict=True)},
    )


def _photos(folder: Path) -> list[Subject]:
    """One person a photo, named by the file."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in PHOTO_SUFFIXES and file.is_file()]
    files = [file for file in files if not file.name.startswith(".")]
    if not files:
        raise UsageError(f"there are no photos in {folder}", f"photos end in {', '.join(PHOTO_SUFFIXES)}")
    return [Subject(file.stem, (file,)) for file in files]


def _prompts(folder: Path, given: Path | None, split: Split) -> list[str]:
    if given is not None:
        if split != "full":
            raise UsageError(
                "--split belongs to the data set's own prompts", "leave out --prompts or --split"
            )
        return prompts_file(given)
    file = folder / PROMPTS[split]
    if not file.is_file():
        raise UsageError(
            f"the data set has no {file.name} in {folder}", "give the prompts with --prompts FILE, one a line"
        )
    return prompts_file(file)


def _manifest(path: Path) -> list[Subject]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the manifest {path}: {error}", "it is JSON lines in UTF-8") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    found = [
        _subject(line, f"{path}:{number}", path.parent)
        for number, line in lines
        if line and not line.startswith("#")
    ]
    if not found:
        raise UsageError(
            f"the manifest {path} names nobody", 'a line is {"identity": "ann", "photos": [...]}'
        )
    return found


def _subject(line: str, where: str, folder: Path) -> Subject:
    try:
        data = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{where}: is not valid JSON: {error}", "one JSON object a line") from error
    if not isinstance(data, dict):
        raise UsageError(f"{where}: is not a JSON object", 'a line is {"identity": "ann", "photos": [...]}')
    photos = data.get("photos")
    photos = [photos] if isinstance(photos, str) else photos
    if not isinstance(photos, list) or not photos or not all(isinstance(one, str) for one in photos):
        near = nearest("photos", [name for name in data if name not in _RESERVED])
        raise UsageError(
            f"{where}: 'photos' must be one or several paths",
            f"is '{near}' meant?" if near else 'as in "photos": ["ann/1.jpg", "ann/2.jpg"]',
        )
    name, held_out = data.get("identity", Path(photos[0]).stem), data.get("held_out")
    if not isinstance(name, str) or not (held_out is None or isinstance(held_out, str)):
        raise UsageError(
            f"{where}: 'identity' and 'held_out' must be text", "a name, and the path of a photo"
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
        f"{where}: the attribute '{key[:80]}' must be text or a number", "leave it out otherwise"
    )


def _check_names(subjects: Iterable[Subject], path: Path) -> None:
    """Names become folders, so two that a file system takes for one would mix people."""
    seen: dict[str, str] = {}
    for subject in subjects:
        name = subject.name
        if not _names_a_folder(name):
            raise UsageError(
                f"{path}: {name[:80]!r} cannot name a person", "a name is used as a folder's name"
            )
        if name.endswith(_ENDINGS):
            raise UsageError(
                f"{path}: '{name}' cannot name a person",
                f"'{name[name.rindex('+') :]}' at its end is how a run marks other photos of somebody",
            )
        # Some file systems know no case, some write accents in another way.
        folded = unicodedata.normalize("NFC", name.casefold())
        twin = seen.get(folded)
        if twin is not None:
            raise UsageError(
                f"{path}: two people are called '{name}'" + ("" if twin == name else f" or '{twin}'"),
                "one line (or one photo) a person; several photos go into one line's 'photos'",
            )
        seen[folded] = name


def _names_a_folder(name: str) -> bool:
    """Whether every file system takes the name as it is: Windows drops dots and spaces at the end, and what
    is no Unicode (a file name in an old encoding) cannot be written down."""
    plain = all(ord(sign) >= 32 and sign not in '/\\:*?"<>|' for sign in name)
    return plain and name == name.strip().rstrip(".") != "" and name.isprintable()


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
    """SHA-256 (hex) of a file's bytes; None where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
