"""Figures as one HTML file: drawn here as SVG, with a script for the values under the pointer.

Nothing is loaded from elsewhere, and without the script the page shows the same lines and tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from proma_megatron.figures import palette
from proma_megatron.figures.panels import Panel
from proma_megatron.figures.runs import Group
from proma_megatron.figures.series import Series, at_end, series, shares, step_seconds
from proma_megatron.figures.svg import LEFT, RIGHT, Frame, draw_panel, frame_of
from proma_megatron.figures.words import legend_label, reading_aid, seconds, spread

MAX_POINTS = 12_000  # of all lines together; a page of more would be slow, and larger than 1 MB

_STYLE = Path(__file__).with_name("page.css")
_SCRIPT = Path(__file__).with_name("page.js")


def write_page(
    path: Path,
    title: str,
    groups: Sequence[Group],
    panels: Sequence[Panel],
    *,
    columns: int,
    command: str | None,
) -> None:
    """Write the page.

    Args:
        columns: panels in a row, where the window is wide enough.
        command: what made the runs or the page, to be shown; None: not known.
    """
    lines = [[series(group, panel.key) for group in groups] for panel in panels]
    stride = _stride(lines)
    lines = [[_thin(line, stride) for line in of_panel] for of_panel in lines]
    frames = [frame_of(of_panel) for of_panel in lines]
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE.read_text()}{_colors()}</style>",
        "</head>",
        f'<body style="--columns: {columns}">',
        f"<h1>{escape(title)}</h1>",
        *_introduction(groups, stride),
        *_legend(groups),
        '<main class="panels">',
        *_figures(panels, lines, frames),
        "</main>",
        *_final_values(groups, panels),
        *_cost(groups),
    ]
    if command is not None:
        parts += ["<h2>Command</h2>", f"<pre><code>{escape(command)}</code></pre>"]
    parts += [
        f'<script type="application/json" id="data">{_embedded(panels, lines, frames)}</script>',
        f"<script>{_SCRIPT.read_text()}</script>",
        "</body>",
        "</html>",
    ]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------- the data


def _stride(lines: Sequence[Sequence[Series]]) -> int:
    """Return every how many points one is shown."""
    points = sum(len(line.points) for of_panel in lines for line in of_panel)
    return -(-points // MAX_POINTS) or 1


def _thin(line: Series, stride: int) -> Series:
    """Return every ``stride``-th point and the last one."""
    kept = line.points[::stride]
    if line.points and kept[-1] is not line.points[-1]:
        kept += (line.points[-1],)
    return Series(line.label, kept)


def _embedded(
    panels: Sequence[Panel], lines: Sequence[Sequence[Series]], frames: Sequence[Frame | None]
) -> str:
    """Return what the script reads, as JSON that can't end the element that it is in."""
    found = [
        {
            "key": panel.key,
            "percent": panel.percent,
            "frame": None if frame is None else frame._asdict(),
            "groups": [
                {
                    "label": line.label,
                    "step": line.steps,
                    "n": [point.n for point in line.points],
                    "mean": [_rounded(point.mean) for point in line.points],
                    "low": _bounds(line, [point.low for point in line.points]),
                    "high": _bounds(line, [point.high for point in line.points]),
                }
                for line in of_panel
            ],
        }
        for panel, of_panel, frame in zip(panels, lines, frames, strict=True)
    ]
    whole = {
        "margins": {"left": LEFT, "right": RIGHT},
        "colors": len(palette.COLORS),
        "panels": found,
    }
    text = json.dumps(whole, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _bounds(line: Series, values: list[float]) -> list[float] | None:
    """Return a band's values; None where there is no band: they would repeat the means."""
    return [_rounded(value) for value in values] if line.banded else None


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


# --------------------------------------------------------------------------- the page's parts


def _colors() -> str:
    """Return the palette as style properties; black is a line's color on white only."""
    light = "".join(f"--g{i}: {color};" for i, color in enumerate(palette.COLORS))
    black = palette.COLORS.index("#000000")
    return (
        f":root {{ {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ --g{black}: #F2F2F2; }} }}\n"
    )


def _variable(index: int) -> str:
    return f"var(--g{index % len(palette.COLORS)})"


def _introduction(groups: Sequence[Group], stride: int) -> Iterator[str]:
    aid = [reading_aid(groups, None)]
    if stride > 1:
        aid.append(f"Of long runs, one point in {stride} is shown here; the CSV file has all.")
    text = " ".join(part for part in aid if part)
    if text:
        yield f'<p class="aid">{escape(text)}</p>'


def _legend(groups: Sequence[Group]) -> Iterator[str]:
    yield '<div class="legend" role="group" aria-label="Show or hide">'
    for index, group in enumerate(groups):
        yield (
            f'<button type="button" aria-pressed="true" data-group="{index}" '
            f'style="--c: {_variable(index)}"><svg width="26" height="10" aria-hidden="true">'
            f'<line x1="1" x2="25" y1="5" y2="5" stroke="var(--c)" stroke-width="3" '
            f'stroke-dasharray="{palette.dash(index)}"/></svg>'
            f"{escape(legend_label(group))}</button>"
        )
    yield "</div>"


def _figures(
    panels: Sequence[Panel], lines: Sequence[Sequence[Series]], frames: Sequence[Frame | None]
) -> Iterator[str]:
    for index, (panel, of_panel, frame) in enumerate(zip(panels, lines, frames, strict=True)):
        letter = chr(ord("a") + index)
        yield f'<figure data-panel="{index}">'
        yield f"<figcaption>({letter}) {escape(panel.title)}</figcaption>"
        yield from draw_panel(panel, of_panel, frame, f"panel{index}", _variable, palette.dash)
        yield '<div class="readout" aria-live="polite" hidden></div>'
        yield "</figure>"


def _final_values(groups: Sequence[Group], panels: Sequence[Panel]) -> Iterator[str]:
    yield "<h2>Final values</h2>"
    yield '<p class="aid">Mean [lowest, highest] over the seeds.</p>'
    yield from _table(
        ["", "seeds", *(_final_title(panel) for panel in panels)],
        (
            [
                group.label,
                str(len(group.runs)),
                *(spread(at_end(group, panel.key, panel.last)) for panel in panels),
            ]
            for group in groups
        ),
    )


def _final_title(panel: Panel) -> str:
    return panel.title if panel.last == 1 else f"{panel.title}, mean of last {panel.last}"


def _cost(groups: Sequence[Group]) -> Iterator[str]:
    parts = {group.label: shares(group.runs) for group in groups}
    names = list(dict.fromkeys(name for found in parts.values() for name in found))
    if not names:
        return
    names.sort(key=lambda name: name == "other")  # last; the others in the order of a step
    yield "<h2>Cost</h2>"
    yield '<p class="aid">Seconds of an RL step, and the share of each of its phases.</p>'
    yield from _table(
        ["", "seconds a step", *names],
        (
            [
                group.label,
                seconds(step_seconds(group)),
                *(f"{found[name]:.0%}" if name in found else "-" for name in names),
            ]
            for group, found in zip(groups, parts.values(), strict=True)
        ),
    )


def _table(head: Sequence[str], rows: Iterable[list[str]]) -> Iterator[str]:
    yield '<div class="wide"><table>'
    cells = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    yield f"<thead><tr>{cells}</tr></thead><tbody>"
    for first, *others in rows:
        cells = "".join(f"<td>{escape(text)}</td>" for text in others)
        yield f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>'
    yield "</tbody></table></div>"
