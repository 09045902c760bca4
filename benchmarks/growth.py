"""How the cost grows with the work: time against tokens, sequences, parameters and microbatches.

    uv run python benchmarks/growth.py --json OUT.json --png docs/evidence/growth.png

One quantity grows in each series, in one process. To the times of plain accumulation, of ours and
of what ours takes more goes a line ``a + b x`` by least squares, and a power of x by a line through
the logarithms.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from benchmarks.cost.ranks import run_settings
from benchmarks.cost.results import Results, Row
from benchmarks.cost.settings import Effort, Setting, Shape
from proma_megatron.errors import ConfigError, StoppedError
from proma_megatron.processes import logs

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

COLORS = {"plain": "#8a8f98", "proma": "#2f6fb5", "extra": "#2e8b57"}
LABELS = {"plain": "plain", "proma": "PROMA", "extra": "PROMA - plain"}
MICROBATCH_TOKENS = 1024  # T, where the number of sequences grows


def setting(
    tokens: int, sequences: int, microbatches: int = 4, hidden: int = Shape().hidden
) -> Setting:
    return Setting(
        tensor=1,
        tied=False,
        tokens=tokens,
        sequences=sequences,
        microbatches=microbatches,
        shape=Shape(hidden=hidden),
    )


SERIES: dict[str, list[Setting]] = {
    "tokens": [setting(length, 8) for length in (32, 64, 128, 256, 512)],
    "sequences": [setting(MICROBATCH_TOKENS // k, k) for k in (1, 2, 4, 8, 16, 32)],
    "parameters": [setting(64, 8, hidden=size) for size in (128, 256, 384, 512, 768)],
    "microbatches": [setting(64, 8, microbatches=count) for count in (2, 3, 4, 6, 8, 12)],
}
X: dict[str, Callable[[Row], float]] = {
    "tokens": lambda row: row["tokens"] * row["sequences"],
    "sequences": lambda row: row["sequences"],
    "parameters": lambda row: row["projected_parameters"],
    "microbatches": lambda row: row["microbatches"],
}
WORDS = {
    "tokens": "tokens of a microbatch, T (k = 8)",
    "sequences": f"sequences of a microbatch, k (T = {MICROBATCH_TOKENS})",
    "parameters": "projected parameters, d (64 tokens x 8)",
    "microbatches": "microbatches of a step (64 tokens x 8)",
}


def seconds_of(row: Row) -> dict[str, float]:
    """Medians over rounds; of the differences within rounds, too."""
    rounds = row["rounds_seconds"]
    pairs = zip(rounds["proma"], rounds["plain"], strict=True)
    return {**row["seconds"], "extra": statistics.median(ours - plain for ours, plain in pairs)}


def fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float | None]:
    """``y = constant + slope * x`` with its R^2, and the exponent of ``y ~ x^exponent``.

    The exponent is None where a y is not above 0.
    """
    slope, constant = np.polyfit(x, y, 1)
    rest = np.asarray(y) - (constant + slope * np.asarray(x))
    total = float(np.square(np.asarray(y) - np.mean(y)).sum())
    exponent = float(np.polyfit(np.log(x), np.log(y), 1)[0]) if min(y) > 0 else None
    return {
        "constant": float(constant),
        "slope": float(slope),
        "r_squared": 1 - float(np.square(rest).sum()) / total if total else 1.0,
        "exponent": exponent,
    }


def points(results: Results, name: str) -> tuple[list[float], dict[str, list[float]]]:
    """x, and y of each curve, of a series as far as it is measured."""
    rows = [row for row in map(results.row, SERIES[name]) if row is not None]
    found = [seconds_of(row) for row in rows]
    return [X[name](row) for row in rows], {way: [s[way] for s in found] for way in COLORS}


def fits(results: Results) -> dict[str, Any]:
    """By series and curve; a series with fewer than three points has none."""
    out: dict[str, Any] = {}
    for name in SERIES:
        x, curves = points(results, name)
        if len(x) >= 3:
            out[name] = {way: fit(x, y) for way, y in curves.items()}
    return out


def show(found: dict[str, Any]) -> None:
    for name, curves in found.items():
        for way, fitted in curves.items():
            exponent = fitted["exponent"]
            print(
                f"{WORDS[name]:<45} {LABELS[way]:<14} "
                f"{fitted['constant']:9.4f} s + {fitted['slope']:.3e} s x   "
                f"R^2 {fitted['r_squared']:.4f}   "
                f"exponent {'none' if exponent is None else f'{exponent:.2f}'}"
            )


def draw(results: Results, path: Path) -> None:
    found = fits(results)
    if not found:
        raise ConfigError(f"--json is {results.path}, which holds no series; measure one first")
    figure, panels = plt.subplots(
        1, len(found), figsize=(3.9 * len(found), 3.6), squeeze=False, layout="constrained"
    )
    for panel, (name, curves) in zip(panels[0], found.items(), strict=True):
        _panel(panel, name, points(results, name), curves)
    panels[0][0].set_ylabel("seconds of a step")
    handles, labels = panels[0][0].get_legend_handles_labels()
    shown = [label.split(":")[0] for label in labels]
    figure.legend(handles, shown, loc="outside upper center", ncols=len(COLORS), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panel(
    panel: Axes,
    name: str,
    measured: tuple[list[float], dict[str, list[float]]],
    curves: dict[str, Any],
) -> None:
    x, found = measured
    ends = np.array([0.0, max(x) * 1.05])
    for way, color in COLORS.items():
        fitted = curves[way]
        panel.plot(x, found[way], "o", color=color, markersize=4.5, label=LABELS[way])
        panel.plot(ends, fitted["constant"] + fitted["slope"] * ends, color=color, linewidth=1.2)
    notes = "\n".join(
        f"{LABELS[way]}: $R^2$ {curves[way]['r_squared']:.3f}" for way in COLORS if way in curves
    )
    panel.text(0.04, 0.97, notes, transform=panel.transAxes, va="top", fontsize=8)
    panel.set_xlabel(WORDS[name], fontsize=9)
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=min(0.0, *found["extra"]))
    if name == "parameters":
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g}M"))
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def main() -> None:
    logs.configure()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="results, read and written")
    parser.add_argument("--png", type=Path, help="a plot of the series")
    parser.add_argument("--draw", action="store_true", help="only draw what the JSON file holds")
    parser.add_argument("--resume", action="store_true", help="keep the rows of the JSON file")
    parser.add_argument("--series", nargs="+", choices=tuple(SERIES), default=list(SERIES))
    parser.add_argument("--seconds", type=float, default=15.0, help="of rounds, for one setting")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args()
    try:
        run(options)
    except (ConfigError, StoppedError) as error:
        sys.exit(f"error: {error}")


def run(options: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: the options don't fit each other, the files or the machine.
        WorkerError: a rank failed.
    """
    if options.draw and options.png is None:
        raise ConfigError("--draw without --png has nowhere to draw to; give --png FILE.png")
    if not options.draw:
        results = Results.begin(options.json, resume=options.resume)
        wanted = dict.fromkeys(found for name in options.series for found in SERIES[name])
        settings = sorted(results.missing(list(wanted)), key=lambda found: found.shape.hidden)
        effort = Effort(ways=("plain", "proma"), seconds=options.seconds, least=3)
        run_settings(settings, effort, options.json, options.device)
    results = Results.read(options.json)
    results.note({"fits": fits(results)})
    show(fits(results))
    if options.png:
        draw(results, options.png)


if __name__ == "__main__":
    main()
