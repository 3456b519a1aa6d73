"""FastFace: put a person into an image in four diffusion steps."""

import os
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app.api import FastFace

# These libraries send telemetry by default: ONNX Runtime from its import on, and huggingface_hub describes
# this process in its requests and asks the Hub which agent programs to look for. They process photos of
# people, so telemetry is disabled unless the user enables it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = ["FastFace", "__version__"]


def __getattr__(name: str) -> Any:
    # Importing the package must stay cheap for the command line.
    if name == "FastFace":
        # In notebooks, tqdm asks for a package that its bars need; fastface shows none of these bars.
        warnings.filterwarnings("ignore", message="IProgress not found")
        from .app.api import FastFace

        return FastFace
    raise AttributeError(name)
