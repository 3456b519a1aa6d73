from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest
from support.served import PHOTO, Server, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a saved identity `me`."""
    with serving(tmp_path_factory.mktemp("server")) as running:
        with running.client() as client, PHOTO.open("rb") as photo:
            client.post("/api/identities", data={"name": "me"}, files={"photos": photo}).raise_for_status()
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client
