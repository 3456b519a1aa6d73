"""Download the published data set, DiverseFaces, from Google Drive, check its hash and unpack it."""

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
"""The URL of the published scripts. No size or hash was published, so the first download is recorded."""
MAX_UNPACKED = 20 * 10**9
"""Limit of the unpacked size in bytes."""
BY_HAND = (
    "download it with a browser from https://drive.google.com/file/d/1S-hYdGMYgMkkXc7Rc7p6pK_Z0TNnKKZY, "
    "unpack it, and pass its folder to --dataset"
)


def diversefaces_folder(settings: Settings) -> Path:
    """Return the folder of the downloaded data set."""
    return settings.home / "datasets" / DIVERSEFACES


def fetch_diversefaces(
    settings: Settings, *, offline: bool = False, log: Callable[[str], None] = lambda _: None
) -> Path:
    """Return the folder of the data set, after downloading it if necessary.

    Raises:
        ModelUnavailableError: it cannot be downloaded, or has changed since the first download.
    """
    folder = diversefaces_folder(settings)
    if folder.is_dir():
        return folder
    if offline:
        raise ModelUnavailableError("diversefaces is not downloaded, and the network is disabled", BY_HAND)
    archive = folder.with_name(f"{DIVERSEFACES}.zip")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _download(archive)
    records = Records(settings.home / "records")
    sha256 = _checked(archive, records)
    temporary = folder.with_name(f".{DIVERSEFACES}-{secrets.token_hex(4)}")
    try:
        unpack(archive, temporary)
        records.save_hash(URL, archive, sha256)
        os.replace(temporary, folder)
    except ModelUnavailableError:
        archive.unlink()  # not the data set, so the download must not be resumed
        raise
    except OSError as error:
        raise ModelUnavailableError(
            f"cannot unpack {archive}: {error.strerror or error}",
            "free some disk space, then run the same command again",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log(f"{DIVERSEFACES}: {archive.stat().st_size} bytes, SHA-256 {sha256}")
    archive.unlink()
    return folder


def _download(archive: Path) -> None:
    try:
        import gdown
    except ImportError as error:
        raise ModelUnavailableError(
            "the download from Google Drive needs gdown, which is not installed",
            f"pip install 'fastface-cli[diversefaces]', or {BY_HAND}",
        ) from error
    try:
        gdown.download(URL, str(archive), quiet=True, use_cookies=False, resume=True, retries=2, timeout=60)
    except gdown.exceptions.FileURLRetrievalError as error:
        raise ModelUnavailableError(
            "Google Drive refuses to send diversefaces: the quota is used up, or it is no longer public",
            f"try again tomorrow, or {BY_HAND}",
        ) from error
    except Exception as error:  # gdown, requests and urllib3 share no base class
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelUnavailableError(
            f"cannot download diversefaces from Google Drive: {reason}",
            f"run the same command again to resume, or {BY_HAND}",
        ) from error
    if not zipfile.is_zipfile(archive):
        page = archive.read_bytes()[:4096].lower()
        archive.unlink()
        if b"quota" in page or b"too many users" in page:
            raise ModelUnavailableError(
                "the Google Drive quota of diversefaces is used up",
                f"try again tomorrow, or {BY_HAND}",
            )
        raise ModelUnavailableError("the file that Google Drive sent for diversefaces is not a zip", BY_HAND)


def _checked(archive: Path, records: Records) -> str:
    """Return the SHA-256 of the archive, which must be the one of the first download."""
    sha256, known = file_sha256(archive), records.read(URL).sha256
    if known is not None and sha256 != known:
        archive.unlink()
        raise ModelUnavailableError(
            f"diversefaces has changed since the first download: SHA-256 {sha256}, before {known}",
            "scores of the two are not comparable; to accept it, delete its record from the cache folder",
        )
    return sha256


def unpack(archive: Path, target: Path) -> None:
    """Extract photos and prompts from the zip, at any folder depth.

    Raises:
        ModelUnavailableError: it does not contain them, or is too large.
    """
    prompts = set(PROMPTS.values())
    with zipfile.ZipFile(archive) as zipped:
        chosen: dict[str, zipfile.ZipInfo] = {}
        for member in sorted(zipped.infolist(), key=lambda info: info.filename.count("/")):
            parts = PurePosixPath(member.filename).parts
            if member.is_dir() or not parts or parts[0] == "__MACOSX" or parts[-1].startswith("."):
                continue
            if parts[-1] in prompts:
                chosen.setdefault(parts[-1], member)
            elif len(parts) > 1 and parts[-2] == PHOTOS and parts[-1].lower().endswith(".png"):
                chosen.setdefault(f"{PHOTOS}/{parts[-1]}", member)
        if not any(name.startswith(PHOTOS) for name in chosen) or not prompts & chosen.keys():
            raise ModelUnavailableError(f"{archive} does not contain {PHOTOS}/ and prompts", BY_HAND)
        if sum(member.file_size for member in chosen.values()) > MAX_UNPACKED:
            raise ModelUnavailableError(f"{archive} unpacks to more than {MAX_UNPACKED} bytes", BY_HAND)
        for name, member in chosen.items():
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            with zipped.open(member) as source, place.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
