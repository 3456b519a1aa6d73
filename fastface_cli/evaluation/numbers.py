"""Format numbers, in the same way for the terminal and the report page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["better", "worse", "differs", "unclear"]
"""Meaning of a difference: `unclear` if its interval contains zero, `differs` if neither direction is
better."""


@dataclass(frozen=True)
class Style:
    """Number format of one column."""

    digits: int
    """Decimal places."""
    unit: str
    """"share" is shown as a percentage, a difference of shares in percentage points."""

    @classmethod
    def of(cls, unit: str, values: Iterable[float | None]) -> Style:
        """Return the format of a column: three significant digits for its largest mean."""
        if unit == "share":
            return cls(1, unit)
        largest = max((abs(value) for value in values if value is not None), default=0.0)
        whole = math.floor(math.log10(largest)) if largest > 0 else 0
        return cls(min(3, max(0, 2 - whole)), unit)

    def value(self, number: float | None) -> str:
        """Format with unit; a dash without a number."""
        if number is None:
            return "-"
        if self.unit == "share":
            return f"{number * 100:.{self.digits}f}%"
        return f"{number:.{self.digits}f}{' ' + self.unit if self.unit else ''}"

    def bare(self, number: float) -> str:
        """Format without unit, for intervals."""
        return f"{number * (100 if self.unit == 'share' else 1):.{self.digits}f}"

    def interval(self, low: float | None, high: float | None) -> str:
        """Format both ends in brackets; empty without an interval."""
        return "" if low is None or high is None else f"[{self.bare(low)}, {self.bare(high)}]"

    def difference(self, number: float | None) -> str:
        """Format with sign and unit."""
        if number is None:
            return "-"
        scaled = number * (100 if self.unit == "share" else 1)
        text = f"{scaled:+.{self.digits}f}"
        unit = "points" if self.unit == "share" else self.unit
        return f"{text} {unit}" if unit else text


def verdict(paired: Mapping[str, Any] | None, higher_is_better: bool | None) -> Verdict:
    """Interpret a paired difference with its 95% confidence interval.

    Args:
        paired: {"difference", "low", "high"}, or None.
        higher_is_better: None if neither direction is better.
    """
    low, high = (paired or {}).get("low"), (paired or {}).get("high")
    if low is None or high is None or low <= 0 <= high:
        return "unclear"
    if higher_is_better is None:
        return "differs"
    return "better" if (low > 0) == higher_is_better else "worse"
