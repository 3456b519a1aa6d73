"""One process, one picture: `python -m fastface_cli.benchmark.cold` is asked on stdin, answers on stdout."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from ..console import line


def main() -> None:
    """Read what to run, run it once, and print the seconds since the process was started."""
    asked = json.loads(sys.stdin.read())

    def since() -> float:
        return time.time() - float(asked["started"])

    from .hardware import device_peak, process_peak
    from .run import one_round
    from .sides import Side, Source, analyzer, build
    from .timing import synchronize

    imported = since()
    side, source = Side.from_json(asked["side"]), Source(**asked["source"])
    engine = build(side, source)
    photo = Path(asked["photo"]) if asked["photo"] else None
    faces = analyzer(side, source) if photo else None
    synchronize(engine.device)
    built, loading = since(), device_peak(engine.device, reset=True)
    one_round(engine, 0, asked["batch"], photo, faces)
    found = {
        "seconds": {"imported": imported, "built": built, "first_picture": since()},
        "process_peak_bytes": process_peak(),
        "loading_peak_bytes": loading,
        "device_peak_bytes": device_peak(engine.device),
    }
    line(json.dumps(found))


if __name__ == "__main__":
    main()
