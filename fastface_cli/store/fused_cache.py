"""Fused models kept between runs: which there are, whether they are whole, and room for new ones.

Loading a stack from its published files means casting, and adding every LoRA to the UNet, which takes longer
than reading the result. So the result is kept: one safetensors file for each set of inputs in `home/fused`,
beside a small JSON file that says what it was made of. A file is trusted as long as its size and time of
change are those of the moment it was written; else it is hashed again, and removed where its bytes differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

from .. import console
from ..errors import ModelUnavailableError
from ..recipe.schema import Recipe
from .layout import check_room
from .records import file_sha256
from .states import human_bytes

FORMAT = 1
"""Of the files; another number is another key."""
FUSING = ("diffusers", "peft")
"""Packages whose version may change what fusing gives."""
PREFIX = "fused-"
"""How `fastface cache` names an entry: this and twelve digits of its key."""
STALE = 24 * 3600
"""Seconds after which an unfinished file belongs to a process that died."""


@dataclass(frozen=True)
class Fused:
    """One kept model.

    Args:
        key: 64 hex digits of everything that entered it.
        recipe: the recipe that it was first made for.
        inputs: for people: role, file and scale of what was fused.
        bytes, mtime_ns, sha256: of the file as it was written.
    """

    key: str
    recipe: str
    inputs: tuple[str, ...]
    bytes: int
    mtime_ns: int
    sha256: str

    @property
    def name(self) -> str:
        """What a user types to remove it."""
        return PREFIX + self.key[:12]


def fused_inputs(recipe: Recipe, paths: Mapping[str, Path]) -> dict[str, list[Path]]:
    """The files that enter a fused UNet, and text encoders where a LoRA speaks to them, by role.

    Args:
        recipe: whose LoRAs.
        paths: where each of `recipe.references()` lies.
    """
    base, found = paths["base"], {}
    folders = [base / name for name in ("unet", "text_encoder", "text_encoder_2")]
    found["base"] = [base] if base.is_file() else _files(folders)
    for role, path in sorted(paths.items()):
        if role == "unet":
            found[role] = [path] if path.is_file() else _files([path / "unet"])
        elif role in ("distillation", "adapter") or role.startswith("lora."):
            found[role] = [path]
    return found


def _files(folders: Sequence[Path]) -> list[Path]:
    return sorted(path for folder in folders for path in folder.glob("*") if path.is_file())


def fused_key(recipe: Recipe, inputs: Mapping[str, Sequence[Path]], device: str, dtype: str) -> str:
    """What a fused model is remembered by: a hash of everything that decides its numbers.

    A file counts by its real path, size and time of change, which is how the store knows its own files too.

    Args:
        recipe: the scales of its LoRAs count.
        inputs: of `fused_inputs`.
        device: kind of device that fuses; two kinds round differently.
        dtype: of the numbers.

    Raises:
        OSError: a file is not there.
    """
    told = {
        "format": FORMAT,
        "versions": {name: version(name) for name in FUSING},
        "files": {role: [_fingerprint(path) for path in files] for role, files in inputs.items()},
        "scales": [lora.scale for lora in recipe.model.loras] + [recipe.adapter.lora_scale],
        "device": device,
        "dtype": dtype,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _fingerprint(path: Path) -> tuple[str, int, int]:
    real = path.resolve()
    stat = real.stat()
    return str(real), stat.st_size, stat.st_mtime_ns


class FusedCache:
    """The kept models of this machine.

    Args:
        folder: where they lie; it need not exist.
        limit: bytes that all of them may take; those not used for longest go first. 0 keeps none.
        least: inputs of fewer bytes load in a moment and are not kept.
    """

    def __init__(self, folder: Path, limit: int, least: int = 1_000_000_000) -> None:
        self.folder, self.limit, self.least = folder, limit, least

    def worthwhile(self, inputs: Mapping[str, Sequence[Path]]) -> bool:
        """Whether a model made of these files is looked for and kept."""
        size = sum(path.stat().st_size for files in inputs.values() for path in files)
        return self.limit > 0 and size >= self.least

    def file(self, key: str) -> Path:
        """Where the model of a key lies."""
        return self.folder / f"{key}.safetensors"

    def _note(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def find(self, key: str) -> Path | None:
        """The file of a key if it is here and whole; one that is not is removed."""
        entry = _parse(self._note(key))
        if entry is None or entry.key != key:
            return None
        path = self.file(key)
        try:
            stat = path.stat()
            if (stat.st_size, stat.st_mtime_ns) != (entry.bytes, entry.mtime_ns):
                if stat.st_size != entry.bytes or file_sha256(path) != entry.sha256:
                    console.note(f"{path} has changed since it was written; it is made anew")
                    self.remove(key)
                    return None
                self._write_note(replace(entry, mtime_ns=stat.st_mtime_ns))
            os.utime(self._note(key))  # used just now
        except OSError:
            return None
        return path

    def keep(
        self,
        key: str,
        recipe: str,
        inputs: Sequence[str],
        size: int,
        write: Callable[[BinaryIO], str],
    ) -> Path | None:
        """Keep a model; where that cannot be, say so and go on without.

        Args:
            key: of `fused_key`.
            recipe, inputs: told to people.
            size: bytes that `write` will write.
            write: writes the file and returns its SHA-256 (hex).

        Returns:
            Where it went, or None.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(size)
            return self._write(key, recipe, inputs, write)
        except (OSError, ModelUnavailableError) as error:
            reason = getattr(error, "strerror", None) or getattr(error, "message", None) or str(error)
            console.note(f"the fused models are not kept for the next start: {reason}")
            return None

    def _make_room(self, size: int) -> None:
        if size > self.limit:
            raise ModelUnavailableError(
                f"they take {human_bytes(size)}, and the setting fused_cache allows {human_bytes(self.limit)}"
            )
        for path in self._unfinished():
            path.unlink(missing_ok=True)
        oldest = sorted(self.entries(), key=lambda entry: self._used(entry.key))
        total = sum(entry.bytes for entry in oldest)
        while total + size > self.limit:
            total -= oldest[0].bytes
            console.note(f"{oldest[0].name} ({oldest[0].recipe}) makes room for other fused models")
            self.remove(oldest.pop(0).key)
        check_room(self.folder, size)

    def _write(self, key: str, recipe: str, inputs: Sequence[str], write: Callable[[BinaryIO], str]) -> Path:
        temporary = self.folder / f".{key[:12]}-{secrets.token_hex(4)}.tmp"
        try:
            with open(temporary, "xb") as file:
                digest = write(file)
                file.flush()
                os.fsync(file.fileno())  # a name must never outlive the bytes behind it
            stat = temporary.stat()
            entry = Fused(key, recipe, tuple(inputs), stat.st_size, stat.st_mtime_ns, digest)
            # First the file: a note without a file is nothing, a file without its note would never be found.
            os.replace(temporary, self.file(key))
            self._write_note(entry)
        finally:
            temporary.unlink(missing_ok=True)
        return self.file(key)

    def _write_note(self, entry: Fused) -> None:
        temporary = self.folder / f".{entry.key[:12]}-{secrets.token_hex(4)}.tmp"
        temporary.write_text(json.dumps(asdict(entry)), encoding="utf-8")
        os.replace(temporary, self._note(entry.key))

    def entries(self) -> list[Fused]:
        """Every kept model."""
        found = (_parse(path) for path in sorted(self.folder.glob("*.json")))
        return [entry for entry in found if entry is not None and self.file(entry.key).is_file()]

    def remove(self, key: str) -> int:
        """Remove a model; returns the bytes freed.

        Raises:
            OSError: the file system refuses.
        """
        freed = 0
        for path in (self.file(key), self._note(key)):
            with suppress(FileNotFoundError):
                freed += path.stat().st_size
                path.unlink()
        return freed

    def clear(self) -> int:
        """Remove everything, unfinished files too; returns the bytes freed."""
        freed = 0
        for path in self.folder.glob("*"):
            freed += path.stat().st_size
            path.unlink()
        return freed

    def _used(self, key: str) -> float:
        return self._note(key).stat().st_mtime

    def _unfinished(self) -> list[Path]:
        """What processes that died left behind."""
        left = [path for path in self.folder.glob("*.safetensors") if not path.with_suffix(".json").exists()]
        left += self.folder.glob(".*.tmp")
        return [path for path in left if path.stat().st_mtime < time.time() - STALE]


def _parse(path: Path) -> Fused | None:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        return Fused(**{**read, "inputs": tuple(read["inputs"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
