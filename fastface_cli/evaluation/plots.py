"""Plots of a run as inline SVG that uses the colors of the page."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

INK, FAINT = "#010203", "#040506"
"""Placeholders for the text and line colors of the page."""
MARKERS = "osD^vPX*h"
"""One fewer than colors, so that color and marker together distinguish ninety recipes."""
COLORS = 10
"""Number of `--series-N` colors of the page."""


@dataclass(frozen=True)
class Point:
    """One recipe: on each axis the mean and the ends of its interval (None: no interval)."""

    name: str
    x: tuple[float, float | None, float | None]
    y: tuple[float, float | None, float | None]

    @property
    def known(self) -> bool:
        """Whether both means are numbers."""
        return math.isfinite(self.x[0]) and math.isfinite(self.y[0])


def scatter(points: Sequence[Point], x_title: str, y_title: str) -> str:
    """Plot recipes on two metrics with their 95% confidence intervals.

    Args:
        points: in the order of the series colors of the page.
        x_title, y_title: axis titles.

    Returns:
        One `<svg>` element. Names are escaped text; colors are `--series-N`, `--faint` and `currentColor`
        of the page, so that the plot follows dark mode and print styles.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",  # keep text searchable, copyable and accessible
        "svg.hashsalt": f"{x_title}/{y_title}",  # reproducible bytes, and different ids for two plots
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "text.parse_math": False,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for number, point in enumerate(points):
            if not point.known:
                continue
            color, marker = _placeholder(number), MARKERS[number % len(MARKERS)]
            axes.errorbar(
                point.x[0],
                point.y[0],
                xerr=_arms(point.x),
                yerr=_arms(point.y),
                fmt="none",
                ecolor=color,
                elinewidth=1.2,
                capsize=3,
            )
            axes.plot(*point.x[:1], *point.y[:1], marker, color=color, markersize=8, label=_label(point.name))
        axes.set_xlabel(x_title)
        axes.set_ylabel(y_title)
        axes.grid(color=FAINT, linewidth=0.5, alpha=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(0.08)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return _for_page(written.getvalue(), f"{y_title} against {x_title}")


def _arms(value: tuple[float, float | None, float | None]) -> list[list[float]] | None:
    mean, low, high = value
    return None if low is None or high is None else [[mean - low], [high - mean]]


def _label(name: str) -> str:
    """Return a legend label; matplotlib would skip labels that start with an underscore."""
    return "\u200b" + name if name.startswith("_") else name


def _placeholder(number: int) -> str:
    return f"#0a0b{number % COLORS:02x}"


def _for_page(svg: str, title: str) -> str:
    """Return the `<svg>` element alone, with page colors and without a fixed size."""
    root = ElementTree.fromstring(svg)
    for name in ("width", "height"):
        del root.attrib[name]
    root.attrib = {"role": "img", "aria-label": title, **root.attrib}
    colors = {INK: "currentColor", FAINT: "var(--faint)"}
    colors |= {_placeholder(number): f"var(--series-{number})" for number in range(COLORS)}
    for element in list(root.iter()):
        for child in [child for child in element if child.tag.endswith(("}metadata", "}style"))]:
            element.remove(child)
        # HTML implies both namespaces.
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        if element.tag == "g":
            element.attrib.pop("id", None)  # unused, and two plots would have the same ids
        style = element.attrib.get("style", "")
        for placeholder, color in colors.items():
            style = style.replace(placeholder, color)
        if style:
            element.attrib["style"] = style
    return ElementTree.tostring(root, encoding="unicode")
