"""Measure one image in a new process: `python -m fastface_cli.benchmark.cold`, JSON on stdin and stdout."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Read the request, run it once, and print the seconds since the process was started."""
    request = json.loads(sys.stdin.read())

    def elapsed() -> float:
        return time.time() - float(request["started"])

    from .hardware import device_peak, process_peak
    from .run import one_round
    from .sides import Side, Source, build, photo_reader
    from .timing import synchronize

    imported = elapsed()
    side, source = Side.from_json(request["side"]), Source(**request["source"])
    engine = build(side, source)
    photo = Path(request["photo"]) if request["photo"] else None
    read = photo_reader([side], source, photo) if photo else None
    synchronize(engine.device)
    built, loading = elapsed(), device_peak(engine.device, reset=True)
    one_round(engine, 0, request["batch"], read)
    measurements = {
        "seconds": {"imported": imported, "built": built, "first_picture": elapsed()},
        "process_peak_bytes": process_peak(),
        "loading_peak_bytes": loading,
        "device_peak_bytes": device_peak(engine.device),
    }
    print(json.dumps(measurements), flush=True)


if __name__ == "__main__":
    main()
