"""Run the fault scripts of this folder and print what passed.

Each module here that has a function `run() -> list[tuple[str, int, int]]` (what, passed, of) is a script. Names
on the command line select modules by prefix: `python -m tests.faults eval store_links`. FASTFACE_FAULTS=long
runs the full sizes; the default is a short form for continuous integration.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import time
import traceback
from pathlib import Path


def main(prefixes: list[str]) -> int:
    """Run the selected scripts; return 1 if a check failed or nothing was selected."""
    rows: list[tuple[str, int, int, float]] = []
    for module in sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])):
        if module.startswith("_") or (prefixes and not module.startswith(tuple(prefixes))):
            continue
        began = time.monotonic()
        try:
            run = getattr(importlib.import_module(f"{__package__}.{module}"), "run", None)
            if run is None:
                continue
            results = run()
        except Exception:  # a broken script is a failed check: the others still run
            traceback.print_exc()
            results = [("the script itself", 0, 1)]
        seconds = time.monotonic() - began
        for what, passed, of in results:
            rows.append((f"{module}: {what}", passed, of, seconds))
            print(f"{'ok  ' if passed == of else 'FAIL'} {passed}/{of}  {rows[-1][0]}", flush=True)
    print("\n| script: fault | passed | of | seconds (script) |\n|---|---:|---:|---:|")
    for name, passed, of, seconds in rows:
        print(f"| {name} | {passed} | {of} | {seconds:.0f} |")
    return 0 if rows and all(passed == of for _, passed, of, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
