"""How numbers are written, the same way in the terminal's table and on the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["better", "worse", "differs", "unclear"]
"""What a difference says: `unclear` where its interval holds zero, `differs` where neither end is better."""


@dataclass(frozen=True)
class Style:
    """How the numbers of one column are written."""

    digits: int
    """After the point."""
    unit: str
    """"share" is written as a percentage, a difference of shares in points of it."""

    @classmethod
    def of(cls, unit: str, values: Iterable[float | None]) -> Style:
        """One style for all of a column's means: three significant digits for the largest of them."""
        if unit == "share":
            return cls(1, unit)
        largest = max((abs(value) for value in values if value is not None), default=0.0)
        whole = math.floor(math.log10(largest)) if largest > 0 else 0
        return cls(min(3, max(0, 2 - whole)), unit)

    def value(self, number: float | None) -> str:
        """With its unit; a dash where there is none."""
        if number is None:
            return "-"
        if self.unit == "share":
            return f"{number * 100:.{self.digits}f}%"
        return f"{number:.{self.digits}f}{' ' + self.unit if self.unit else ''}"

    def bare(self, number: float) -> str:
        """Without its unit, as within an interval."""
        return f"{number * (100 if self.unit == 'share' else 1):.{self.digits}f}"

    def interval(self, low: float | None, high: float | None) -> str:
        """Both ends in brackets; nothing where there is no interval."""
        return "" if low is None or high is None else f"[{self.bare(low)}, {self.bare(high)}]"

    def difference(self, number: float | None) -> str:
        """With its sign."""
        if number is None:
            return "-"
        scaled = number * (100 if self.unit == "share" else 1)
        text = f"{scaled:+.{self.digits}f}"
        unit = "points" if self.unit == "share" else self.unit
        return f"{text} {unit}" if unit else text


def verdict(paired: Mapping[str, Any] | None, higher_is_better: bool | None) -> Verdict:
    """What a paired difference with its 95% interval says.

    Args:
        paired: {"difference", "low", "high"}, or None.
        higher_is_better: None where neither end is.
    """
    low, high = (paired or {}).get("low"), (paired or {}).get("high")
    if low is None or high is None or low <= 0 <= high:
        return "unclear"
    if higher_is_better is None:
        return "differs"
    return "better" if (low > 0) == higher_is_better else "worse"
