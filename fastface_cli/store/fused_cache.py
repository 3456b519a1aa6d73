"""The cache of fused models: lookup, integrity checks and eviction.

Loading a stack from its published files casts the weights and adds every LoRA to the UNet, which takes longer
than reading the result. So the result is cached: one safetensors file for each set of inputs in `home/fused`,
next to a small JSON file that lists the inputs. A file is trusted while its size and modification time are
those recorded when it was written; otherwise it is hashed again, and removed if its bytes differ.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

from ..errors import ModelUnavailableError
from ..recipe.schema import Recipe
from .layout import check_room
from .links import make_folder, outside_link, remove_entry
from .records import file_sha256
from .states import human_bytes

log = logging.getLogger(__name__)

FORMAT = 1
"""Version of the file format; part of the key."""
FUSING = ("diffusers", "peft")
"""Packages whose version may change the fused weights."""
PREFIX = "fused-"
"""Prefix of entry names in `fastface cache`, followed by twelve digits of the key."""
STALE = 24 * 3600
"""Age in seconds after which an unfinished file is treated as left over from a crash."""


@dataclass(frozen=True)
class FusedEntry:
    """One cached model.

    Args:
        key: hash (64 hex digits) of all inputs.
        recipe: the first recipe that used it.
        inputs: role, file and scale of each input, for display.
        bytes, mtime_ns, sha256: of the file when it was written.
    """

    key: str
    recipe: str
    inputs: tuple[str, ...]
    bytes: int
    mtime_ns: int
    sha256: str

    @property
    def name(self) -> str:
        """Its name in `fastface cache`."""
        return PREFIX + self.key[:12]


def fused_inputs(recipe: Recipe, paths: Mapping[str, Path]) -> dict[str, list[Path]]:
    """The input files of a fused UNet, and of text encoders with a LoRA, by role.

    Args:
        recipe: the recipe with the LoRAs.
        paths: the path of each of `recipe.references()`.
    """
    base = paths["base"]
    inputs: dict[str, list[Path]] = {}
    folders = [base / name for name in ("unet", "text_encoder", "text_encoder_2")]
    inputs["base"] = [base] if base.is_file() else _files(folders)
    for role, path in sorted(paths.items()):
        if role == "unet":
            inputs[role] = [path] if path.is_file() else _files([path / "unet"])
        elif role in ("distillation", "adapter") or role.startswith("lora."):
            inputs[role] = [path]
    return inputs


def _files(folders: Sequence[Path]) -> list[Path]:
    return sorted(path for folder in folders for path in folder.glob("*") if path.is_file())


def fused_key(recipe: Recipe, inputs: Mapping[str, Sequence[Path]], device: str, dtype: str) -> str:
    """The cache key: a hash of everything that determines the fused weights.

    A file is identified by its real path, size and modification time, as in the records of the store.

    Args:
        recipe: provides the scales of its LoRAs.
        inputs: result of `fused_inputs`.
        device: kind of device that fuses; rounding differs between kinds.
        dtype: data type of the weights.

    Raises:
        OSError: a file does not exist.
    """
    key_fields = {
        "format": FORMAT,
        "versions": {name: version(name) for name in FUSING},
        "files": {role: [_fingerprint(path) for path in files] for role, files in inputs.items()},
        "scales": [lora.scale for lora in recipe.model.loras] + [recipe.adapter.lora_scale],
        "device": device,
        "dtype": dtype,
    }
    return hashlib.sha256(json.dumps(key_fields, sort_keys=True).encode()).hexdigest()


def _fingerprint(path: Path) -> tuple[str, int, int]:
    real = path.resolve()
    stat = real.stat()
    return str(real), stat.st_size, stat.st_mtime_ns


class FusedCache:
    """The cached fused models of this machine.

    Args:
        folder: the cache folder; it need not exist.
        limit: maximum total bytes; the least recently used model is evicted first. 0 disables the cache.
        least: inputs with fewer bytes load quickly and are not cached.
    """

    def __init__(self, folder: Path, limit: int, least: int = 1_000_000_000) -> None:
        self.folder, self.limit, self.least = folder, limit, least

    def worthwhile(self, inputs: Mapping[str, Sequence[Path]]) -> bool:
        """Whether a model with these inputs is cached."""
        size = sum(path.stat().st_size for files in inputs.values() for path in files)
        return self.limit > 0 and size >= self.least

    def file(self, key: str) -> Path:
        """The path of the model with this key."""
        return self.folder / f"{key}.safetensors"

    def _metadata_path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def find(self, key: str) -> Path | None:
        """The file of a key if it is cached and intact; a damaged file is removed."""
        if self._is_outside():
            return None
        entry = _parse(self._metadata_path(key))
        if entry is None or entry.key != key:
            return None
        path = self.file(key)
        try:
            stat = path.stat()
            if (stat.st_size, stat.st_mtime_ns) != (entry.bytes, entry.mtime_ns):
                if stat.st_size != entry.bytes or file_sha256(path) != entry.sha256:
                    log.warning("%s has changed since it was written; it is created again", path)
                    self.remove(key)
                    return None
                self._write_metadata(replace(entry, mtime_ns=stat.st_mtime_ns))
            os.utime(self._metadata_path(key))  # marks it as most recently used
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
        """Cache a model; if that fails, log a warning and continue.

        Args:
            key: result of `fused_key`.
            recipe, inputs: for display.
            size: bytes that `write` will write.
            write: writes the file and returns its SHA-256 (hex).

        Returns:
            The path of the file, or None.
        """
        try:
            make_folder(self.folder, self.folder.parent)
            self._make_room(size)
            return self._write(key, recipe, inputs, write)
        except (OSError, ModelUnavailableError) as error:
            reason = getattr(error, "strerror", None) or getattr(error, "message", None) or str(error)
            log.warning("fused models are not cached for the next start: %s", reason)
            return None

    def _make_room(self, size: int) -> None:
        if size > self.limit:
            raise ModelUnavailableError(
                f"they need {human_bytes(size)}, but the setting fused_cache allows {human_bytes(self.limit)}"
            )
        for path in self._unfinished():
            path.unlink(missing_ok=True)
        oldest = sorted(self.entries(), key=lambda entry: self._used(entry.key))
        total = sum(entry.bytes for entry in oldest)
        while total + size > self.limit:
            total -= oldest[0].bytes
            log.info("%s (%s) is removed to make room", oldest[0].name, oldest[0].recipe)
            self.remove(oldest.pop(0).key)
        check_room(self.folder, size)

    def _write(self, key: str, recipe: str, inputs: Sequence[str], write: Callable[[BinaryIO], str]) -> Path:
        temporary = self.folder / f".{key[:12]}-{secrets.token_hex(4)}.tmp"
        try:
            with open(temporary, "xb") as file:
                digest = write(file)
                file.flush()
                os.fsync(file.fileno())  # after a crash, the name must not point to missing bytes
            stat = temporary.stat()
            entry = FusedEntry(key, recipe, tuple(inputs), stat.st_size, stat.st_mtime_ns, digest)
            # The file comes first: metadata without a file would be a dangling entry.
            os.replace(temporary, self.file(key))
            self._write_metadata(entry)
        finally:
            temporary.unlink(missing_ok=True)
        return self.file(key)

    def _write_metadata(self, entry: FusedEntry) -> None:
        temporary = self.folder / f".{entry.key[:12]}-{secrets.token_hex(4)}.tmp"
        temporary.write_text(json.dumps(asdict(entry)), encoding="utf-8")
        os.replace(temporary, self._metadata_path(entry.key))

    def entries(self) -> list[FusedEntry]:
        """Every cached model."""
        if self._is_outside():
            return []
        entries = (_parse(path) for path in sorted(self.folder.glob("*.json")))
        return [entry for entry in entries if entry is not None and self.file(entry.key).is_file()]

    def remove(self, key: str) -> int:
        """Remove a model; returns the bytes freed.

        Raises:
            OSError: the file system refuses.
        """
        freed = 0
        for path in (self.file(key), self._metadata_path(key)):
            freed += remove_entry(path, self.folder.parent)
        return freed

    def clear(self) -> int:
        """Remove everything, including unfinished files; returns the bytes freed."""
        return sum(remove_entry(path, self.folder.parent) for path in list(self.folder.glob("*")))

    def _is_outside(self) -> bool:
        """Whether the folder is a link to a folder outside the cache, whose files are not changed."""
        return outside_link(self.folder / "file", self.folder.parent) is not None

    def _used(self, key: str) -> float:
        return self._metadata_path(key).stat().st_mtime

    def _unfinished(self) -> list[Path]:
        """Files left over from crashed processes."""
        leftovers = [
            path for path in self.folder.glob("*.safetensors") if not path.with_suffix(".json").exists()
        ]
        leftovers += self.folder.glob(".*.tmp")
        return [path for path in leftovers if path.stat().st_mtime < time.time() - STALE]


def _parse(path: Path) -> FusedEntry | None:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return FusedEntry(**{**fields, "inputs": tuple(fields["inputs"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
