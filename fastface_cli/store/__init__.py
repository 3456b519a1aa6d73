"""Artifacts: source, size and license; download, resume, verify and remove."""

from __future__ import annotations

from .layout import face_pack_folder
from .manifest import Artifact, RemoteFile, load_manifest, parse_manifest, resolve
from .progress import DownloadProgress, DownloadStarted, FileFinished, ProgressObserver, VerifyProgress
from .states import Entry, FileStatus, Missing, human_bytes, license_line
from .store import Store

__all__ = [
    "Artifact",
    "DownloadProgress",
    "DownloadStarted",
    "Entry",
    "FileFinished",
    "FileStatus",
    "Missing",
    "ProgressObserver",
    "RemoteFile",
    "Store",
    "VerifyProgress",
    "face_pack_folder",
    "human_bytes",
    "license_line",
    "load_manifest",
    "parse_manifest",
    "resolve",
]
