"""Compare the time of `fastface --help` with that of the imports that it requires.

Runs `fastface --help` and `python -c "import typer, rich, pydantic, yaml"` alternately, so that machine noise
affects both, and prints the median of each and their ratio (target: at most 1.5).

    python benchmarks/startup.py [RUNS]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 15
TARGET = 1.5
IMPORTS = "import typer, rich, pydantic, yaml"


def commands() -> dict[str, list[str]]:
    """Return the measured commands: the installed `fastface`, otherwise its entry point."""
    script = Path(sys.executable).with_name("fastface")
    entry = "from fastface_cli.cli import main; main()"
    fastface = [str(script)] if script.is_file() else [sys.executable, "-c", entry]
    return {"fastface --help": [*fastface, "--help"], IMPORTS: [sys.executable, "-c", IMPORTS]}


def wall(command: list[str]) -> float:
    """Return the seconds of one process from start to end."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else RUNS
    measured = commands()
    for command in measured.values():
        wall(command)  # fills bytecode and file caches
    seconds: dict[str, list[float]] = {label: [] for label in measured}
    for _ in range(runs):
        for label, command in measured.items():
            seconds[label].append(wall(command))
    medians = {label: statistics.median(times) for label, times in seconds.items()}
    for label, median in medians.items():
        print(f"{1000 * median:7.1f} ms  {label}")
    ratio = medians["fastface --help"] / medians[IMPORTS]
    print(f"{ratio:7.2f}     ratio ({runs} runs, target: at most {TARGET})")


if __name__ == "__main__":
    main()
