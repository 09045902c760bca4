"""Figures as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

from proma_megatron.figures import palette
from proma_megatron.figures.panels import Panel
from proma_megatron.figures.runs import Group
from proma_megatron.figures.series import RUNNING_MEAN_STEPS, Series, running_mean, series
from proma_megatron.figures.words import legend_label, reading_aid

_GREY = "#555555"
_STYLE: dict[Any, Any] = {  # matplotlib types its keys as a closed set
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelcolor": _GREY,
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "legend.frameon": False,
}
_MARKED = 40  # points up to which each one is marked


def draw_picture(
    path: Path,
    groups: Sequence[Group],
    panels: Sequence[Panel],
    *,
    columns: int,
    smooth: bool,
) -> None:
    """Draw a line and a band of each group in each panel.

    Args:
        columns: panels in a row.
        smooth: whether a group of one run shows a running mean over its noisy values.
    """
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(_STYLE):
        margins = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)  # inches around each panel
        figure = Figure(figsize=(4.6 * columns, 3.3 * rows + 0.6), dpi=150, layout=margins)
        canvas = FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
        smoothed = False
        for index, (axes, panel) in enumerate(zip(grid.flat, panels, strict=True)):
            smoothed |= _draw_panel(axes, panel, groups, smooth)
            axes.set_title(f"({chr(ord('a') + index)}) {panel.title}")
        for axes in grid[-1]:
            axes.set_xlabel("RL step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        figure.legend(
            handles=[
                Line2D([], [], linewidth=2.5, label=_plain(legend_label(group)), **_stroke(index))
                for index, group in enumerate(groups)
            ],
            loc="outside upper left",
            ncols=min(len(groups), 4),
        )
        aid = reading_aid(groups, RUNNING_MEAN_STEPS if smoothed else None)
        if aid:
            figure.supxlabel(aid, x=0.01, ha="left", fontsize=9, color=_GREY)
        canvas.draw()
    # 256 colors are plenty for curves, at a third of the size.
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(
        path, format="PNG", optimize=True, dpi=(150, 150)
    )


def _draw_panel(axes: Axes, panel: Panel, groups: Sequence[Group], smooth: bool) -> bool:
    """Draw all groups; tell whether any line is a running mean."""
    smoothed = drawn = False
    for index, group in enumerate(groups):
        found = series(group, panel.key)
        if not found.points:
            continue
        drawn = True
        if smooth and panel.noisy and len(group.runs) == 1:
            smoothed |= _draw_smoothed(axes, found, index)
        else:
            _draw_line(axes, found, index)
    axes.set_ylabel(panel.unit)
    if panel.percent:
        axes.yaxis.set_major_formatter(lambda value, _position: f"{100 * value:.4g}%")
    if not drawn:
        axes.grid(visible=False)
        axes.set_yticks([])
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=_GREY)
    elif axes.dataLim.ymin >= 0:
        axes.set_ylim(bottom=0)
    return smoothed


def _draw_line(axes: Axes, found: Series, index: int) -> None:
    """Draw the mean, and a band between the lowest and the highest seed."""
    means = [point.mean for point in found.points]
    if found.banded:
        axes.fill_between(
            found.steps,
            [point.low for point in found.points],
            [point.high for point in found.points],
            color=palette.color(index),
            alpha=0.18,
            linewidth=0,
            zorder=1.5,
        )
    marker = "o" if len(means) <= _MARKED else ""  # also: a line through one point is invisible
    axes.plot(found.steps, means, linewidth=1.6, marker=marker, markersize=2.8, **_stroke(index))


def _draw_smoothed(axes: Axes, found: Series, index: int) -> bool:
    """Draw a thin raw line and a thick running mean."""
    means = np.array([point.mean for point in found.points])
    # Antialiased, a noisy curve is pixels of every color, and the PNG twice the size.
    axes.plot(
        found.steps, means, color=palette.color(index), linewidth=0.7, alpha=0.35, zorder=1.5,
        antialiased=False,
    )  # fmt: skip
    marker = "." if len(means) == 1 else ""
    axes.plot(found.steps, running_mean(means), linewidth=1.8, marker=marker, **_stroke(index))
    return True


def _stroke(index: int) -> dict[str, Any]:
    dashes = tuple(float(length) for length in palette.dash(index).split())
    return {"color": palette.color(index), "linestyle": (0, dashes) if dashes else "-"}


def _plain(text: str) -> str:
    """Return a label that matplotlib neither typesets nor, for its first "_", leaves out."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
