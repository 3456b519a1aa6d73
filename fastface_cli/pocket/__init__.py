"""The trained miniature of the whole system that ships inside the wheel."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
