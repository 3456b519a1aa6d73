"""The published data set, DiverseFaces: fetched from Google Drive, remembered by its hash, unpacked."""

from __future__ import annotations

import os
import secrets
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from ..errors import ModelUnavailableError
from ..settings import Settings
from ..store.records import Records, file_sha256
from .dataset import PHOTOS, PROMPTS

DIVERSEFACES = "diversefaces"
URL = "https://drive.google.com/uc?id=1S-hYdGMYgMkkXc7Rc7p6pK_Z0TNnKKZY"
"""As the published scripts fetch it. Neither size nor hash was published: what comes first is remembered."""
MAX_UNPACKED = 20 * 10**9
"""Bytes that the zip may unpack to."""
BY_HAND = (
    "fetch it with a browser from https://drive.google.com/file/d/1S-hYdGMYgMkkXc7Rc7p6pK_Z0TNnKKZY, "
    "unpack it, and give its folder to --dataset"
)


def diversefaces_folder(settings: Settings) -> Path:
    """Where the data set lies once it is fetched."""
    return settings.home / "datasets" / DIVERSEFACES


def fetch_diversefaces(
    settings: Settings, *, offline: bool = False, log: Callable[[str], None] = lambda _: None
) -> Path:
    """The folder of the data set, fetched if it is not there.

    Raises:
        ModelUnavailableError: it cannot be had, or is not what was fetched before.
    """
    folder = diversefaces_folder(settings)
    if folder.is_dir():
        return folder
    if offline:
        raise ModelUnavailableError("diversefaces is not here, and the network is not used", BY_HAND)
    archive = folder.with_name(f"{DIVERSEFACES}.zip")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _download(archive)
    records = Records(settings.home / "records")
    got = _checked(archive, records)
    temporary = folder.with_name(f".{DIVERSEFACES}-{secrets.token_hex(4)}")
    try:
        unpack(archive, temporary)
        records.save_hash(URL, archive, got)
        os.replace(temporary, folder)
    except ModelUnavailableError:
        archive.unlink()  # it is something else: not to be gone on with
        raise
    except OSError as error:
        raise ModelUnavailableError(
            f"cannot unpack {archive}: {error.strerror or error}",
            "make room, then run the same command again",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log(f"{DIVERSEFACES}: {archive.stat().st_size} bytes, SHA-256 {got}")
    archive.unlink()
    return folder


def _download(archive: Path) -> None:
    try:
        import gdown
    except ImportError as error:
        raise ModelUnavailableError(
            "fetching from Google Drive needs gdown, which is not installed",
            f"pip install 'fastface-cli[diversefaces]', or {BY_HAND}",
        ) from error
    try:
        gdown.download(URL, str(archive), quiet=True, use_cookies=False, resume=True, retries=2, timeout=60)
    except gdown.exceptions.FileURLRetrievalError as error:
        raise ModelUnavailableError(
            "Google Drive does not hand out diversefaces now: too many people have fetched it lately, "
            "or it is no longer public",
            f"try again in a day, or {BY_HAND}",
        ) from error
    except Exception as error:  # gdown, requests and urllib3 each have their own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelUnavailableError(
            f"cannot fetch diversefaces from Google Drive: {reason}",
            f"run the same command again to go on where it stopped, or {BY_HAND}",
        ) from error
    if not zipfile.is_zipfile(archive):
        page = archive.read_bytes()[:4096].lower()
        archive.unlink()
        if b"quota" in page or b"too many users" in page:
            raise ModelUnavailableError(
                "Google Drive answers with its quota page: too many people have fetched diversefaces lately",
                f"try again in a day, or {BY_HAND}",
            )
        raise ModelUnavailableError("what Google Drive sent for diversefaces is not a zip", BY_HAND)


def _checked(archive: Path, records: Records) -> str:
    """The archive's SHA-256, which must be that of the first time."""
    got, known = file_sha256(archive), records.read(URL).sha256
    if known is not None and got != known:
        archive.unlink()
        raise ModelUnavailableError(
            f"diversefaces has changed since it was fetched first: SHA-256 {got}, then {known}",
            "numbers of the two do not compare; to accept it, remove its record from the cache folder",
        )
    return got


def unpack(archive: Path, target: Path) -> None:
    """Take photos and prompts out of the zip, however deep they lie in it.

    Raises:
        ModelUnavailableError: it does not hold them, or unpacks to too much.
    """
    prompts = set(PROMPTS.values())
    with zipfile.ZipFile(archive) as zipped:
        chosen: dict[str, zipfile.ZipInfo] = {}
        for member in sorted(zipped.infolist(), key=lambda one: one.filename.count("/")):
            parts = PurePosixPath(member.filename).parts
            if member.is_dir() or not parts or parts[0] == "__MACOSX" or parts[-1].startswith("."):
                continue
            if parts[-1] in prompts:
                chosen.setdefault(parts[-1], member)
            elif len(parts) > 1 and parts[-2] == PHOTOS and parts[-1].lower().endswith(".png"):
                chosen.setdefault(f"{PHOTOS}/{parts[-1]}", member)
        if not any(name.startswith(PHOTOS) for name in chosen) or not prompts & chosen.keys():
            raise ModelUnavailableError(f"{archive} does not hold {PHOTOS}/ and prompts", BY_HAND)
        if sum(member.file_size for member in chosen.values()) > MAX_UNPACKED:
            raise ModelUnavailableError(f"{archive} unpacks to more than {MAX_UNPACKED} bytes", BY_HAND)
        for name, member in chosen.items():
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            with zipped.open(member) as source, place.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
