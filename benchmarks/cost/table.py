"""The table of docs/evidence/cost.md, from a file of results.

uv run python -m benchmarks.cost.table OUT.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cost.results import Results, Row, setting_of
from benchmarks.cost.settings import WAYS

RATIOS = {
    "PROMA / plain": "proma/plain",
    "hooks, kept / plain": "hooks/plain",
    "by module / plain": "hooks_by_layer/plain",
    "kept / PROMA": "hooks/proma",
    "by module / PROMA": "hooks_by_layer/proma",
}
HEAD = (
    "TP",
    "ends",
    "tokens x k",
    "rounds",
    "plain, s",
    *RATIOS,
    "MiB above plain: PROMA, kept, by module",
)


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown, by layout, ends, tokens and sequences."""

    def place(row: Row) -> tuple[int, ...]:
        return row["tensor"], row["tied"], row["tokens"], row["sequences"]

    lines = [cells_line(HEAD), "|---" * len(HEAD) + "|"]
    return lines + [cells_line(_cells(row)) for row in sorted(rows, key=place)]


def _cells(row: Row) -> list[str]:
    setting = setting_of(row)
    return [
        str(setting.tensor),
        "tied" if setting.tied else "untied",
        f"{setting.tokens:,} x {setting.sequences}",
        str(row["rounds"]),
        f"{row['seconds']['plain']:.2f}",
        *(_ratio(row, name) for name in RATIOS.values()),
        ", ".join(_mebibytes(row, way) for way in WAYS if way != "plain"),
    ]


def _ratio(row: Row, name: str) -> str:
    """Median and quartiles; of one round there are none."""
    found = row["ratios"].get(name)
    if found is None:
        return "-"
    if row["rounds"] == 1:
        return f"{found['median']:.2f}"
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def _mebibytes(row: Row, way: str) -> str:
    peaks = row["peak_bytes"]
    return f"{(peaks[way] - peaks['plain']) / 2**20:.0f}" if way in peaks else "-"


def cells_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Results of benchmarks/projection.py as a table.")
    parser.add_argument("results", type=Path)
    print("\n".join(table(Results.read(parser.parse_args().results).rows)))


if __name__ == "__main__":
    main()
