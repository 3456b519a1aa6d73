"""What `make bench` prints: the ratios that the pocket stack shows on two CPU cores.

    python benchmarks/bench.py [--repeats 30] [--no-cold]

Everything runs in turn in one process, so that the ratios hold on a noisy machine; none of it is a test.
"compiled" is ours with --compile and channels innermost in memory, which change no result; the reference
stays eager, as it is published.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REACH = {"fastface": 1.3, "am1": 2.6}
LOOP = 1.1
HERE = Path(__file__).parent


FASTEST = ("--compile", "--accelerate", "channels_last=on")


def ratio(method: str, repeats: int, *flags: str) -> dict[str, Any]:
    """The published structure against ours, with more items of speed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", "from fastface_cli.cli import main; main()", "bench"]
        command += ["--recipe", f"pocket-{method}", "--against", "reference", "--device", "cpu"]
        command += ["--repeats", str(repeats), "--no-cold", "-o", folder, *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        report = json.loads((Path(folder) / "bench.json").read_text())
    found: dict[str, Any] = report["ratios"][0]
    return found


def said(one: dict[str, float]) -> str:
    """A ratio and its interval."""
    return f"{one['value']:.2f} ({one['low']:.2f} to {one['high']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--no-cold", action="store_true")
    options = parser.parse_args()
    for method, reach in REACH.items():
        for name, flags in (("as it is", ()), ("compiled", FASTEST)):
            found = ratio(method, options.repeats, *flags)
            print(
                f"reference / ours, {method:<9} {name}: denoising loop {said(found['loop'])}, reach {reach}; "
                f"end to end {said(found['total'])}; latents apart by {found['latents_relative_l2']:.0e}",
                flush=True,
            )
    print(f"our loop / its bare model calls, reach {LOOP} at most:", flush=True)
    subprocess.run([sys.executable, str(HERE / "loop.py"), "--repeat", str(options.repeats)], check=True)
    if not options.no_cold:
        print(
            "cold load with the kept fused models / without, miniature (--full: the published size):",
            flush=True,
        )
        subprocess.run([sys.executable, str(HERE / "coldstart.py")], check=True)


if __name__ == "__main__":
    main()
