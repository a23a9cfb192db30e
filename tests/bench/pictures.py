"""Pictures of curves, as SVG that is the same for the same figures and needs no fonts but those it brings."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from msgspec import Struct

_DECADES = 30
"""A scale is logarithmic when its largest value is so many times its smallest."""
_INCHES = (5.0, 3.4)
"""The size of a panel."""


class Curve(Struct, frozen=True):
    """Values of one thing."""

    label: str
    x: Sequence[float] | Sequence[str]
    """Numbers, or names that stand beside each other at even distances."""
    y: Sequence[float]


class Panel(Struct, frozen=True):
    """Curves over the same axes."""

    x_label: str
    """With its unit, as `y_label`."""
    y_label: str
    curves: Sequence[Curve]


class Picture(Struct, frozen=True):
    """Panels side by side."""

    name: str
    """Of the file, without its ending."""
    title: str
    panels: Sequence[Panel]


def draw(picture: Picture, directory: Path) -> Path:
    """Write a picture as SVG into a directory and return its path."""
    path = directory / f"{picture.name}.svg"
    width, height = _INCHES
    with rc_context({"svg.hashsalt": "collab", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(width * len(picture.panels), height), layout="constrained")
        figure.suptitle(picture.title)
        for place, panel in enumerate(picture.panels, start=1):
            _draw(panel, figure.add_subplot(1, len(picture.panels), place))
        figure.savefig(path, format="svg", metadata={"Date": None})
    return path


def _draw(panel: Panel, axes: Axes) -> None:
    for curve in panel.curves:
        axes.plot(curve.x, curve.y, marker="o", markersize=3, label=curve.label)
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
    if _spans_decades([x for curve in panel.curves for x in curve.x if not isinstance(x, str)]):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,g}")
    heights = [y for curve in panel.curves for y in curve.y]
    if _spans_decades(heights):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("")
    else:
        axes.set_ylim(0, 1.1 * max(heights))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.grid(alpha=0.3)
    if len(panel.curves) > 1:
        axes.legend(frameon=False)


def _spans_decades(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) >= _DECADES * min(values)
