"""FastFace: put a person into an image in four diffusion steps."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app.api import FastFace

# Both report to their makers unless told not to, ONNX Runtime from its import on and with a number for this
# machine in the home folder. Photos of people pass through them: nothing is told unless the user asks for it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

__version__ = "0.1.0"
__all__ = ["FastFace", "__version__"]


def __getattr__(name: str) -> Any:
    # Importing the package must stay cheap for the command line.
    if name == "FastFace":
        from .app.api import FastFace

        return FastFace
    raise AttributeError(name)
