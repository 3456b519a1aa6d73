"""Measure the speed ratios of the pocket recipes on a CPU; run by `make bench`.

    python benchmarks/bench.py [--repeats 30] [--no-cold]

Sides alternate in one process, so that the ratios are reliable on a noisy machine. "compiled" is our pipeline
with --compile and channels_last, which do not change the result; the reference is not compiled, as published.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TARGETS = {"fastface": 1.3, "am1": 2.6}
LOOP_TARGET = 1.1
HERE = Path(__file__).parent


FASTEST = ("--compile", "--accelerate", "channels_last=on")


def compare(method: str, repeats: int, *flags: str) -> dict[str, Any]:
    """Compare the published implementation with ours, with additional flags."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", "from fastface_cli.cli import main; main()", "bench"]
        command += ["--recipe", f"pocket-{method}", "--against", "reference", "--device", "cpu"]
        command += ["--repeats", str(repeats), "--no-cold", "-o", folder, *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        report = json.loads((Path(folder) / "bench.json").read_text())
    comparison: dict[str, Any] = report["ratios"][0]
    return comparison


def interval(ratio: dict[str, float]) -> str:
    """Format a ratio with its confidence interval."""
    return f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--no-cold", action="store_true")
    options = parser.parse_args()
    for method, target in TARGETS.items():
        for name, flags in (("default", ()), ("compiled", FASTEST)):
            ratios = compare(method, options.repeats, *flags)
            print(
                f"reference / ours, {method:<9} {name}: loop {interval(ratios['loop'])}, target {target}; "
                f"total {interval(ratios['total'])}; latents differ by {ratios['latents_relative_l2']:.0e}",
                flush=True,
            )
    print(f"our loop / its model calls alone, target at most {LOOP_TARGET}:", flush=True)
    subprocess.run([sys.executable, str(HERE / "loop.py"), "--repeat", str(options.repeats)], check=True)
    if not options.no_cold:
        print(
            "cold load with cached fused models / without, miniature (coldstart.py --full: published size):",
            flush=True,
        )
        subprocess.run([sys.executable, str(HERE / "coldstart.py")], check=True)


if __name__ == "__main__":
    main()
