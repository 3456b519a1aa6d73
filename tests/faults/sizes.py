"""Sizes of the fault scripts."""

from __future__ import annotations

import os


def size(name: str, short: int, long: int) -> int:
    """Return how often a script injects its fault.

    Args:
        name: the script; the environment variable FASTFACE_FAULTS_NAME (upper case) overrides the size.
        short: the size in continuous integration.
        long: the size with FASTFACE_FAULTS=long.
    """
    override = os.environ.get(f"FASTFACE_FAULTS_{name.upper()}")
    if override is not None:
        return int(override)
    return long if os.environ.get("FASTFACE_FAULTS") == "long" else short
