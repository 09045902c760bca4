"""The plot of ratios against tokens per sequence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from benchmarks.cost.results import Row

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

COLORS = {"proma": "#2f6fb5", "hooks": "#c0392b", "hooks_by_layer": "#d68910"}
LABELS = {"proma": "PROMA", "hooks": "hooks, kept", "hooks_by_layer": "hooks, by module"}
MARKERS = ("o", "s", "^", "D", "v", "P")
LIMITS = (1.05, 1.10)


def draw(rows: Sequence[Row], path: Path) -> None:
    """A panel for each tensor-parallel size, and for tied and untied ends."""
    sizes = sorted({row["tensor"] for row in rows})
    ends = sorted({row["tied"] for row in rows})
    counts = sorted({row["sequences"] for row in rows})
    lengths = sorted({row["tokens"] for row in rows})
    figure, panels = plt.subplots(
        len(ends),
        len(sizes),
        figsize=(1.5 + 4.6 * len(sizes), 1.2 + 3.3 * len(ends)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for tied, line in zip(ends, panels, strict=True):
        for size, panel in zip(sizes, line, strict=True):
            mine = [row for row in rows if row["tied"] == tied and row["tensor"] == size]
            _panel(panel, mine, counts, lengths)
            panel.set_title(f"tensor {size}, {'tied' if tied else 'untied'} ends", fontsize=10)
    for line in panels:
        line[0].set_ylabel("step time over plain accumulation", fontsize=9)
    for panel in panels[-1]:
        panel.set_xlabel("tokens per sequence")
    handles = [
        *(Line2D([], [], color=color, label=LABELS[way]) for way, color in COLORS.items()),
        *(
            Line2D([], [], color="#555", marker=marker, linestyle="", label=f"k = {k}")
            for k, marker in zip(counts, MARKERS, strict=False)
        ),
    ]
    columns = len(handles) if len(sizes) > 1 else len(COLORS)  # one panel is narrow
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panel(panel: Axes, rows: Sequence[Row], counts: Sequence[int], lengths: Sequence[int]) -> None:
    for way, color in COLORS.items():
        for at, k in enumerate(counts):
            mine = sorted(
                (r for r in rows if r["sequences"] == k and f"{way}/plain" in r["ratios"]),
                key=lambda r: r["tokens"],
            )
            found = [row["ratios"][f"{way}/plain"] for row in mine]
            middle = [ratio["median"] for ratio in found]
            spread = [
                [ratio["median"] - ratio["low"] for ratio in found],
                [ratio["high"] - ratio["median"] for ratio in found],
            ]
            panel.errorbar(
                [row["tokens"] for row in mine],
                middle,
                yerr=spread,
                color=color,
                marker=MARKERS[at % len(MARKERS)],
                markersize=4.5,
                linewidth=1.2,
                elinewidth=0.8,
                alpha=0.9,
            )
    for limit in LIMITS:
        panel.axhline(limit, color="#777", linewidth=0.8, linestyle="--")
        # At the right edge: beside the axis the labels would lie on those of 1 and of each other.
        panel.annotate(
            f"{limit:.2f}",
            (1.0, limit),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color="#555",
        )
    panel.axhline(1.0, color="#333", linewidth=0.8)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(lengths))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    panel.yaxis.set_major_locator(FixedLocator([1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0]))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.grid(axis="y", alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
