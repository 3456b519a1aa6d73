"""Artifacts: source, size and license; download, resume, verify and remove."""

from __future__ import annotations

from .layout import face_pack_folder
from .manifest import Artifact, RemoteFile, load_manifest, parse_manifest, resolve
from .states import Entry, FileStatus, Missing, human_bytes, license_line
from .store import Store

__all__ = [
    "Artifact",
    "Entry",
    "FileStatus",
    "Missing",
    "RemoteFile",
    "Store",
    "face_pack_folder",
    "human_bytes",
    "license_line",
    "load_manifest",
    "parse_manifest",
    "resolve",
]
