"""Run every stage in order, each in its own process; run the command again to resume after a kill."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

STAGES: tuple[tuple[str, float], ...] = (
    ("data", 0),
    ("recognizer", 16),
    ("detector", 25),
    ("clip", 10),
    ("vae", 45),
    ("latents", 0),
    ("expression", 3),
    ("unet", 60),
    ("decoder", 30),
    ("lora", 25),
    ("adapter", 90),
    ("export", 0),
    ("points", 0),
    ("report", 0),
)
"""Stages and their minutes on two CPU cores; a GPU needs a tenth of the time."""

ENVIRONMENT = {"MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_MMAP_THRESHOLD_": "100000000000"}
"""Keeps glibc from returning memory after each step, which costs a third of the time on a CPU."""


def main() -> None:
    """Run the stages with the given options."""
    parser = argparse.ArgumentParser(prog="python -m training.all")
    parser.add_argument("--work", type=Path, default=Path("~/.cache/fastface-training").expanduser())
    parser.add_argument("--portraits", type=Path, default=Path("../shared/portraits"))
    parser.add_argument("--size", type=int, choices=(128, 256), default=128)
    parser.add_argument("--share", type=float, default=1.0, help="factor for the minutes of every stage")
    parser.add_argument("--from", dest="first", choices=[name for name, _ in STAGES], default=STAGES[0][0])
    arguments = parser.parse_args()
    names = [name for name, _ in STAGES]
    for name, minutes in STAGES[names.index(arguments.first) :]:
        command = [sys.executable, "-m", f"training.{name}", "--work", str(arguments.work)]
        command += ["--portraits", str(arguments.portraits), "--size", str(arguments.size)]
        if minutes:
            command += ["--minutes", str(minutes * arguments.share)]
        print("$", " ".join(command), flush=True)
        subprocess.run(command, check=True, env=ENVIRONMENT | os.environ)


if __name__ == "__main__":
    main()
