"""FastFace: put a person into a picture in four diffusion steps."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import FastFace

__version__ = "0.1.0"
__all__ = ["FastFace", "__version__"]


def __getattr__(name: str) -> Any:
    # Importing the package must stay cheap for the command line.
    if name == "FastFace":
        from .api import FastFace

        return FastFace
    raise AttributeError(name)
