"""Artefacts: where they come from, how big they are, which licence; fetch, resume, verify, remove."""

from __future__ import annotations

from .layout import face_pack_folder
from .manifest import Artefact, RemoteFile, load_manifest, parse_manifest, resolve
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
    "load_manifest",
    "parse_manifest",
    "resolve",
]
