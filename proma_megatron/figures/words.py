"""What figures say in words and numbers, alike in pictures, pages and on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from proma_megatron.figures.runs import Group
from proma_megatron.figures.series import Spread


def legend_label(group: Group) -> str:
    """Return a group's name, with the number of its seeds unless it is a run by its own name."""
    count = len(group.runs)
    if count == 1 and group.label == group.runs[0].name:
        return group.label
    return f"{group.label} ({count} seed{'s' if count > 1 else ''})"


def reading_aid(groups: Sequence[Group], smoothed_over: int | None) -> str:
    """Say what lines and bands are; empty where lines are simply the values.

    Args:
        smoothed_over: steps of the running mean, where one is drawn.
    """
    parts = []
    if any(len(group.runs) > 1 for group in groups):
        parts.append(
            "Line: mean of the seeds with a value at that step; band: lowest to highest of them."
        )
    if smoothed_over is not None:
        parts.append(f"Thin line: each step; thick line: mean of the last {smoothed_over} steps.")
    return " ".join(parts)


def number(value: float, digits: int = 4) -> str:
    """Round to so many significant digits: "0.8125", "3.2e-05"."""
    return f"{value:.{digits}g}"


def spread(found: Spread | None, digits: int = 4) -> str:
    """Write "mean [lowest, highest]", the value alone of one run, a dash of none."""
    if found is None:
        return "-"
    if found.n == 1:
        return number(found.mean, digits)
    mean, low, high = (number(value, digits) for value in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]"


def seconds(found: Spread | None) -> str:
    """Return the mean in hundredths of a second."""
    return "-" if found is None else f"{found.mean:.2f}"
