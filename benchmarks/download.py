"""Compare downloads: `fastface download`, one connection, and `hf download`, from a Hub on this machine.

The server answers after a latency, and sends at most a number of bytes per second over each connection, as
distant servers do. All sides fetch the same files into an empty cache; each run is a new process.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.hub_server import COMMIT, Hub, environment_of, hub_server, sha256

CHILD = """
import sys, time
from pathlib import Path
from fastface_cli.settings import load_settings
from fastface_cli.store import Store, fetching, parse_manifest, transfer
if sys.argv[2] == "one":
    fetching.FILES = transfer.CONNECTIONS = 1
known = parse_manifest(Path(sys.argv[1]).read_text())
Store(load_settings(), known=known).ensure(list(known.values()))
"""


def fill(hub: Hub, sizes: list[int]) -> None:
    """Serve files of these sizes in one repository."""
    block = random.Random(1).randbytes(1 << 20)
    for number, size in enumerate(sizes):
        content = (number.to_bytes(8, "little") + block * (size // len(block) + 1))[:size]
        hub.files[f"bench/models/{number:02}.safetensors"] = content


def manifest(hub: Hub) -> str:
    """A manifest of the files."""
    files = [
        [key.rsplit("/", 1)[-1], str(len(content)), sha256(content)] for key, content in hub.files.items()
    ]
    entry = {"name": "models", "kind": "lora", "summary": "files", "repo": "bench/models", "commit": COMMIT}
    licenses = {"free": ["MIT", "https://example.org", "yes", ""]}
    return json.dumps({"licenses": licenses, "artifacts": [entry | {"license": "free", "files": files}]})


def run(command: list[str], hub: Hub, home: Path) -> float:
    """Run a command with an empty cache; returns seconds."""
    environment = environment_of(hub, home) | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    start = time.monotonic()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return time.monotonic() - start


def main() -> None:
    """Print a table of seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before each answer")
    parser.add_argument("--rate", type=float, default=4e6, help="bytes per second and connection")
    parser.add_argument("--large", type=int, default=2, help="number of files of 128 MiB")
    parser.add_argument("--small", type=int, default=20, help="number of files of 20 kB")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    hf = str(Path(sys.executable).with_name("hf"))
    with hub_server() as hub, tempfile.TemporaryDirectory() as work:
        fill(hub, [20_000] * options.small + [128 << 20] * options.large)
        hub.latency, hub.rate = options.latency, options.rate
        text = Path(work) / "manifest.yaml"
        text.write_text(manifest(hub), encoding="utf-8")
        commands = {
            "fastface": [sys.executable, "-c", CHILD, str(text), "all"],
            "hf download": [hf, "download", "bench/models", "--revision", COMMIT],
            "fastface, one connection": [sys.executable, "-c", CHILD, str(text), "one"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                with tempfile.TemporaryDirectory(dir=work) as home:
                    seconds[name].append(run(command, hub, Path(home)))
        total = sum(map(len, hub.files.values()))
    print(f"{total / 1e6:.0f} MB in {options.small + options.large} files")
    ours = statistics.median(seconds["fastface"])
    for name, values in seconds.items():
        median = statistics.median(values)
        rates = f"{total / median / 1e6:6.1f} MB/s, {median / ours:.2f} times the time of fastface"
        print(f"{name:26} {median:7.2f} s  {rates}  ({', '.join(f'{value:.2f}' for value in values)})")


if __name__ == "__main__":
    main()
