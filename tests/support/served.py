"""A real server with the pocket stack, in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

PHOTO = Path(__file__).parents[2] / "examples" / "portrait.png"


@dataclass
class Server:
    """A running server."""

    address: str
    process: subprocess.Popen[str]
    log: Path

    def client(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.address, timeout=120, **options)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)


@contextmanager
def serving(folder: Path, *arguments: str, recipe: str = "pocket") -> Iterator[Server]:
    """Start `fastface serve` on a free port."""
    log = folder / "server.log"
    environment = {**os.environ, "FASTFACE_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastface_cli", "serve", "--recipe", recipe, "--port", "0", *arguments]
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stderr=stderr, text=True, env=environment)
    try:
        yield Server(_address(process, log), process, log)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def _address(process: subprocess.Popen[str], log: Path) -> str:
    import time

    for _ in range(600):
        match = re.search(r"http://\S+", log.read_text())
        if match:
            return match[0].rstrip("/")
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError("the server did not start")


def submit(client: httpx2.Client, photo: Path | None = None, key: str = "", **body: Any) -> httpx2.Response:
    """POST /api/runs; without a photo, the saved identity `me` is used."""
    body = {"prompts": ["a portrait"], "seed": 1, **({} if photo else {"identity": "me"}), **body}
    files = {"photos": photo.read_bytes()} if photo else None
    headers = {"Idempotency-Key": key} if key else {}
    return client.post("/api/runs", data={"request": json.dumps(body)}, files=files, headers=headers)


def events(client: httpx2.Client, run: str, after: int = 0) -> list[tuple[str, dict[str, Any]]]:
    """All events of a run, to its end."""
    received, name = [], ""
    headers = {"Last-Event-ID": str(after)}
    with client.stream("GET", f"/api/runs/{run}/events", headers=headers) as response:
        for line in response.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                received.append((name, json.loads(line.removeprefix("data: "))))
    return received
