"""Artefacts: where they come from, how big they are, which licence; fetch, resume, verify, remove."""

from __future__ import annotations

from ..manifest import Artefact, RemoteFile, manifest, read_manifest, resolve
from .layout import face_pack_folder
from .states import Entry, FileStatus, Missing, human_bytes, licence_line
from .store import Store

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
