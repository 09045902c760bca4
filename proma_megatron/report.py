"""Curves of one or several runs as a PNG, and the few numbers that sum a run up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

from proma_megatron.config import ConfigError
from proma_megatron.metrics import read_metrics
from proma_megatron.run_dir import RunDir

RUNNING_MEAN_STEPS = 10

# Okabe and Ito's palette, which color-blind readers can tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
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


class _Panel(NamedTuple):
    key: str
    title: str
    unit: str


_REWARD = _Panel("reward/mean", "Training reward", "mean reward")
_OTHERS = (
    _Panel("policy/entropy", "Policy entropy", "nats per token"),
    _Panel("policy/kl_initial", "KL to the initial policy", "nats per token"),
    _Panel(
        "projection/removed_energy", "Energy removed by the projection", "share of gradient energy"
    ),
)


class _Run(NamedTuple):
    name: str
    color: str
    rows: list[dict[str, Any]]  # RL steps, ascending


def draw_report(runs: Sequence[Path], out: Path) -> None:
    """Draw reward, entropy, KL and removed energy of ``runs`` over RL steps into the PNG ``out``.

    Raises:
        ConfigError: no run is given, or one has no metrics.jsonl or no RL step in it.
    """
    if not runs:
        raise ConfigError("no run is given to report on; name at least one run directory")
    drawn = [
        _Run(name, _COLORS[i % len(_COLORS)], _rl_rows(path))
        for i, (name, path) in enumerate(zip(_names(runs), runs, strict=True))
    ]
    with matplotlib.rc_context(_STYLE):
        margins = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)  # inches around each panel
        figure = Figure(figsize=(10, 6), dpi=150, layout=margins)
        canvas = FigureCanvasAgg(figure)
        reward, *others = figure.subplots(2, 2, sharex=True).flat
        _draw_reward(reward, drawn)
        for axes, panel in zip(others, _OTHERS, strict=True):
            _draw_panel(axes, panel, drawn)
        for axes in others[1:]:
            axes.set_xlabel("RL step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(
            handles=[
                Line2D([], [], color=run.color, linewidth=2.5, label=run.name) for run in drawn
            ],
            loc="outside upper left",
            ncols=min(len(drawn), 4),
        )
        canvas.draw()
    # 256 colors are plenty for curves, at a third of the size.
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    out.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(256, dither=Image.Dither.NONE).save(
        out, format="PNG", optimize=True, dpi=(150, 150)
    )


def summarize(run: Path) -> dict[str, float]:
    """A run in five numbers; NaN where it recorded none.

    ``reward/first``, ``reward/last_ten`` (mean of the last ten RL steps), ``validation/first`` and
    ``validation/last`` accuracy in RL, and ``seconds/total`` of all steps, the warm start and
    steps that a resumed run repeated included.

    Raises:
        ConfigError: there is no metrics.jsonl, or no RL step in it.
    """
    rows = _rl_rows(run)
    _, reward = _series(rows, "reward/mean")
    _, accuracy = _series(rows, "validation/accuracy")
    seconds = [row.get("seconds/step") for row in read_metrics(RunDir(run).metrics)]
    spent = [value for value in seconds if value is not None]
    nan = float("nan")
    return {
        "reward/first": float(reward[0]) if reward.size else nan,
        "reward/last_ten": float(reward[-10:].mean()) if reward.size else nan,
        "validation/first": float(accuracy[0]) if accuracy.size else nan,
        "validation/last": float(accuracy[-1]) if accuracy.size else nan,
        "seconds/total": float(sum(spent)) if spent else nan,
    }


def running_mean(values: np.ndarray, window: int = RUNNING_MEAN_STEPS) -> np.ndarray:
    """(n,) mean of each value and up to ``window - 1`` before it: (n,) values in, no look-ahead."""
    starts = np.maximum(np.arange(len(values)) - window + 1, 0)
    return np.array([values[start : i + 1].mean() for i, start in enumerate(starts)])


def _draw_reward(axes: Axes, runs: Sequence[_Run]) -> None:
    validated = False
    for run in runs:
        _draw_curve(axes, run, _REWARD.key)
        steps, accuracy = _series(run.rows, "validation/accuracy")
        validated = validated or steps.size > 0
        axes.plot(
            steps, accuracy, linestyle="none", marker="o", markersize=5.5,
            color=run.color, markeredgecolor="white", markeredgewidth=0.9, zorder=3,
        )  # fmt: skip
    title = "Training reward and validation accuracy" if validated else _REWARD.title
    _label(axes, _REWARD._replace(title=title))
    key = [
        Line2D([], [], color=_GREY, alpha=0.45, linewidth=0.8, label="each step"),
        Line2D(
            [], [], color=_GREY, linewidth=1.8, label=f"mean of last {RUNNING_MEAN_STEPS} steps"
        ),
    ]
    if validated:
        axes.set_ylabel("mean reward, accuracy")
        key.append(
            Line2D([], [], color=_GREY, linestyle="none", marker="o", label="validation accuracy")
        )
    axes.legend(handles=key, loc="best", fontsize=9, frameon=True, edgecolor="none")


def _draw_panel(axes: Axes, panel: _Panel, runs: Sequence[_Run]) -> None:
    drawn = [_draw_curve(axes, run, panel.key) for run in runs]
    _label(axes, panel)
    if panel.key == "projection/removed_energy":
        axes.yaxis.set_major_formatter(_percent)
    if not any(drawn):
        axes.grid(visible=False)
        axes.set_yticks([])
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=_GREY)


def _draw_curve(axes: Axes, run: _Run, key: str) -> bool:
    """Draw a raw and a smoothed curve; False if the run has no value of ``key``."""
    steps, values = _series(run.rows, key)
    if not steps.size:
        return False
    # Antialiased, a noisy curve is pixels of every color, and the PNG twice the size.
    axes.plot(
        steps, values, color=run.color, linewidth=0.7, alpha=0.3, zorder=1.5, antialiased=False
    )
    marker = "." if steps.size == 1 else ""  # a line through one point is invisible
    axes.plot(steps, running_mean(values), color=run.color, linewidth=1.8, marker=marker)
    return True


def _label(axes: Axes, panel: _Panel) -> None:
    axes.set_title(panel.title)
    axes.set_ylabel(panel.unit)
    if axes.has_data() and axes.dataLim.ymin >= 0:
        axes.set_ylim(bottom=0)


def _series(rows: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(n,) steps and (n,) values of the rows where ``key`` is there and not null."""
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return np.array([step for step, _ in found]), np.array([value for _, value in found])


def _rl_rows(run: Path) -> list[dict[str, Any]]:
    """The RL rows by ascending step; of a step that a resumed run repeated, the last."""
    path = RunDir(run).metrics
    if not path.is_file():
        raise ConfigError(f"{run} has no metrics.jsonl; give the directory of a run that started")
    by_step = {row["step"]: row for row in read_metrics(path) if row.get("phase") == "rl"}
    if not by_step:
        raise ConfigError(f"{path} has no RL steps yet; wait for the first one, then report")
    return [by_step[step] for step in sorted(by_step)]


def _percent(value: float, _position: float) -> str:
    return f"{100 * value:.4g}%"


def _names(runs: Sequence[Path]) -> list[str]:
    """Directory names, with their parents' where two are alike."""
    paths = [run.resolve() for run in runs]
    names = [path.name for path in paths]
    return [
        path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}"
        for path in paths
    ]
