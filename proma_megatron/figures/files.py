"""A figure's three files, side by side: each is complete or not there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from proma_megatron.figures.page import write_page
from proma_megatron.figures.panels import Panel
from proma_megatron.figures.picture import draw_picture
from proma_megatron.figures.runs import Group
from proma_megatron.figures.table import write_table
from proma_megatron.files import atomic_write


def write_figure(
    png: Path,
    title: str,
    groups: Sequence[Group],
    panels: Sequence[Panel],
    *,
    columns: int,
    smooth: bool = False,
    command: str | None = None,
) -> tuple[Path, Path, Path]:
    """Write the PNG, and of the same stem the CSV and the HTML file; return the paths of all three.

    Args:
        columns: panels in a row.
        smooth: whether a run on its own shows a running mean over its noisy values, in the PNG.
        command: what made them, for the page; None: not known.
    """
    table, page = png.with_suffix(".csv"), png.with_suffix(".html")
    png.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(png) as part:
        draw_picture(part, groups, panels, columns=columns, smooth=smooth)
    with atomic_write(table) as part:
        write_table(part, groups, panels)
    with atomic_write(page) as part:
        write_page(part, title, groups, panels, columns=columns, command=command)
    return png, table, page
