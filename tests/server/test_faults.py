"""The server under faults: killed under load, clients that vanish, a full disk."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from urllib.parse import urlsplit

import httpx2
import pytest
import torch
from PIL import Image
from support.served import PHOTO, events, serving, submit


def test_killed_under_load_and_started_again(tmp_path):
    output = tmp_path / "out"
    lost: list[str] = []

    def load(address: str) -> None:
        with httpx2.Client(base_url=address, timeout=60) as client:
            try:
                for seed in range(50):
                    run = submit(client, PHOTO, seed=seed, count=2).json()["id"]
                    events(client, run)
            except httpx2.HTTPError:
                lost.append("connection")

    with serving(tmp_path, "-o", str(output)) as server:
        threads = [threading.Thread(target=load, args=(server.address,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        while len(list(output.glob("*.png"))) < 3:
            threading.Event().wait(0.05)
        server.kill()
        for thread in threads:
            thread.join(60)
    assert lost == ["connection"] * 4
    for path in output.glob("*.png"):
        Image.open(path).load()
    # A kill in the middle of a write leaves a temporary file, which the next server removes.
    (output / ".fastface-0123456789abcdef.tmp").write_bytes(b"half an image")
    for path in output.glob(".fastface-*.tmp"):
        os.utime(path, (time.time() - 120,) * 2)
    with serving(tmp_path, "-o", str(output)) as server, server.client() as client:
        assert events(client, submit(client, PHOTO, seed=99).json()["id"])[-1][0] == "finished"
    assert {path.suffix for path in output.iterdir()} == {".png"}


def test_clients_that_vanish_leave_the_server_working(server):
    parts = urlsplit(server.address)
    body = json.dumps({"prompt": "a portrait", "identity": "me"}).encode()
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for _ in range(20):
        with socket.create_connection((parts.hostname, parts.port)) as connection:
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    with server.client() as client:
        assert events(client, submit(client).json()["id"])[-1][0] == "finished"
        for run in client.get("/api/runs").json()["runs"]:
            events(client, run["id"])
        states = [run["state"] for run in client.get("/api/runs").json()["runs"]]
        assert states.count("cancelled") >= 15, "nobody waits for them"


@pytest.mark.skipif(os.geteuid() != 0 if hasattr(os, "geteuid") else True, reason="mounts a small disk")
def test_a_full_disk_fails_the_run_and_not_the_server(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=False)
    if mounted.returncode != 0:
        pytest.skip("cannot mount a small disk here")
    try:
        with serving(tmp_path, "-o", str(disk)) as server, server.client() as client:
            names = [events(client, submit(client, PHOTO, seed=n).json()["id"])[-1] for n in range(4)]
            assert names[-1][0] == "failed"
            assert "No space left" in names[-1][1]["error"]["message"]
            for path in disk.glob("*.png"):
                path.unlink()
            assert events(client, submit(client, PHOTO, seed=9).json()["id"])[-1][0] == "finished"
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_a_port_in_use_and_a_missing_recipe_are_reported(tmp_path, capsys):
    from fastface_cli import cli

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.run(["serve", "--recipe", "pocket", "--port", port]) == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.run(["serve", "--recipe", "hyper-fastface"]) == 4
        assert "needs a GPU" in capsys.readouterr().err
    assert cli.run(["serve", "--recipe", "nothing"]) == 2
    assert "there is no recipe 'nothing'" in capsys.readouterr().err
    assert cli.run(["serve", "--recipe", "pocket", "--allow-set", "model.base"]) == 2
    assert "cannot be allowed" in capsys.readouterr().err
    assert cli.run(["serve", "--recipe", "pocket", "--keep", "forever"]) == 2
    assert "--keep" in capsys.readouterr().err


def test_missing_extra_is_reported(monkeypatch, capsys):
    import importlib.util

    from fastface_cli import cli

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else object())
    assert cli.run(["serve", "--recipe", "pocket"]) == 2
    assert "pip install 'fastface-cli[serve]'" in capsys.readouterr().err
