"""Measure `fastface serve` with the pocket stack: overhead of a warm image, many clients, memory.

    python benchmarks/serve.py [--requests 1000] [--clients 16] [--repeat 50]

The overhead is the time of a call of /v1/images/generations less the time of the image itself: reading the
request, the queue, planning, encoding the PNG and base64. The identity is saved, so no face is detected.
Then clients send requests with different seeds and prompts at the same time; each answer must be the image of
its own request. Memory is that of the server process before and after.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
from PIL import Image

PHOTO = Path(__file__).parents[1] / "examples" / "portrait.png"


@contextmanager
def server() -> Iterator[tuple[str, psutil.Process]]:
    """A server in a new process: its address and process."""
    command = [sys.executable, "-m", "fastface_cli", "serve", "--recipe", "pocket", "--port", "0"]
    process = subprocess.Popen([*command, "--max-queue", "64"], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        address = re.search(r"http://\S+", line)
        if address is None:
            raise SystemExit(f"the server did not start: {line}{process.stderr.read()}")
        yield address[0].rstrip("/"), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def generate(client: httpx2.Client, seed: int) -> dict[str, Any]:
    """One image: the metadata in its PNG."""
    body = {"prompt": f"a portrait, take {seed}", "identity": "me", "seed": seed}
    answer = client.post("/v1/images/generations", json=body)
    answer.raise_for_status()
    with Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))) as image:
        metadata: dict[str, Any] = json.loads(image.text["fastface"])  # type: ignore[attr-defined]
    metadata["run"] = answer.headers["x-fastface-run"]
    return metadata


def overheads(client: httpx2.Client, repeat: int) -> list[float]:
    """Milliseconds of each call beyond the time of its image."""
    spent = []
    for seed in range(repeat):
        began = time.perf_counter()
        run = generate(client, seed)["run"]
        total = time.perf_counter() - began
        images = client.get(f"/api/runs/{run}").json()["images"]
        spent.append(1000 * (total - images[0]["seconds"]))
    return spent


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=50)
    options = parser.parse_args()
    with server() as (address, process), httpx2.Client(base_url=address, timeout=600) as client:
        with PHOTO.open("rb") as photo:
            client.post("/api/identities", data={"name": "me"}, files={"photos": photo}).raise_for_status()
        for seed in range(5):
            generate(client, seed)
        spent = overheads(client, options.repeat)
        median, worst = statistics.median(spent), float(np.percentile(spent, 90))
        print(f"overhead: median {median:.1f} ms, 90th percentile {worst:.1f} ms, {len(spent)} images")
        for seed in range(110):  # more than --keep: from here on, memory must not grow
            generate(client, seed)
        before = process.memory_info().rss

        def checked(seed: int) -> bool:
            with httpx2.Client(base_url=address, timeout=600) as own:
                image = generate(own, seed)
            return image["seed"] == seed and image["prompt"] == f"a portrait, take {seed}"

        began = time.perf_counter()
        with ThreadPoolExecutor(options.clients) as pool:
            right = sum(pool.map(checked, range(1000, 1000 + options.requests)))
        took = time.perf_counter() - began
        after = process.memory_info().rss
        print(
            f"{right} of {options.requests} requests from {options.clients} clients answered with their own "
            f"image, {options.requests / took:.1f} per second; memory {before / 1e6:.0f} MB before, "
            f"{after / 1e6:.0f} MB after"
        )


if __name__ == "__main__":
    main()
