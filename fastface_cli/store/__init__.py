"""Artefacts: where they come from, how big they are, which licence; fetch, resume, verify, remove."""

from __future__ import annotations

from ..manifest import Artefact, RemoteFile, manifest, read_manifest, resolve
from .store import (
    Entry,
    FileStatus,
    Missing,
    Store,
    face_pack_folder,
    human_bytes,
    licence_line,
)

__all__ = [
    "Artefact",
    "Entry",
    "FileStatus",
    "Missing",
    "RemoteFile",
    "Store",
    "face_pack_folder",
    "human_bytes",
    "licence_line",
    "manifest",
    "read_manifest",
    "resolve",
]
