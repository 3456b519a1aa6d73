"""FastFace: put a person into a picture in four diffusion steps."""

__version__ = "0.1.0"
