"""Ask the servers whether every pinned file still exists, unchanged. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..errors import ModelUnavailableError
from ..store.failures import SourceError
from ..store.fetching import offered_difference
from ..store.manifest import Artifact, RemoteFile
from ..store.transfer import TransferClient, transfer_client

REQUESTS = 8
"""Requests at the same time."""


@dataclass(frozen=True)
class Pin:
    """A pinned file and the answer of its server.

    Args:
        artifact: name of the artifact.
        path: path in the repository.
        problem: what differs or failed; empty if the file is as pinned.
        hash_seen: whether the server named the SHA-256, so that it could be compared.
    """

    artifact: str
    path: str
    problem: str = ""
    hash_seen: bool = False

    def record(self) -> dict[str, object]:
        """The pin for JSON output."""
        return {
            "name": self.artifact,
            "path": self.path,
            "ok": not self.problem,
            "hash_compared": self.hash_seen,
            "problem": self.problem,
        }


def check_pins(artifacts: Iterable[Artifact]) -> list[Pin]:
    """Send one HEAD request for each file of the artifacts, except those in the package or on this disk.

    Raises:
        ModelUnavailableError: the first server cannot be reached.
    """
    pinned = [
        (artifact, file)
        for artifact in artifacts
        if artifact.repo is not None or artifact.url is not None
        for file in artifact.files
    ]
    with transfer_client() as client, ThreadPoolExecutor(REQUESTS) as pool:
        try:
            client.announce(*pinned[0])
        except SourceError as error:
            if error.status is None:  # no answer at all: the others would not get one either
                raise
        return list(pool.map(lambda item: _check(client, *item), pinned))


def _check(client: TransferClient, artifact: Artifact, file: RemoteFile) -> Pin:
    try:
        offered = client.announce(artifact, file)
    except ModelUnavailableError as error:
        return Pin(artifact.name, file.path, error.message)
    difference = offered_difference(file, offered, file.sha256)
    problem = "" if difference is None else f"not as pinned: {difference}"
    return Pin(artifact.name, file.path, problem, offered.names_sha256)
