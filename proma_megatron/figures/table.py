"""The values behind a figure as CSV, one line a metric, group and step."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from proma_megatron.figures.panels import Panel
from proma_megatron.figures.runs import Group
from proma_megatron.figures.series import series

# n: the runs that have a value at this step. std: sample standard deviation, empty where n is 1.
# seed_values: "seed=value" of each of them, joined by ";".
COLUMNS = ("metric", "group", "step", "n", "mean", "std", "min", "max", "seed_values")


def write_table(path: Path, groups: Sequence[Group], panels: Sequence[Panel]) -> None:
    """Write every point of every line."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for panel in panels:
            for group in groups:
                for point in series(group, panel.key).points:
                    std = "" if point.std is None else point.std
                    each = ";".join(f"{member}={value!r}" for member, value in point.values)
                    numbers = (point.n, point.mean, std, point.low, point.high)
                    table.writerow((panel.key, group.label, point.step, *numbers, each))
