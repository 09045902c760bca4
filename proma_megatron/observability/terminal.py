"""The run on the terminal: a live progress bar and table, or one line per step in a log."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

logger = logging.getLogger(__name__)

MAX_LINE = 119  # characters of a plain line

_PHASES = {"warm_start": "warm start", "rl": "RL"}
_CELLS_PER_ROW = 3
# Rich forgets older steps when it estimates the time left; its default of 30 s is one slow step.
_SPEED_WINDOW_SECONDS = 1800.0


class _Field(NamedTuple):
    key: str
    label: str  # in the table
    short: str  # in a plain line; empty: table only
    spec: str  # format specification


_FIELDS = (
    _Field("loss/supervised", "supervised loss", "loss", ".4f"),
    _Field("reward/mean", "reward", "reward", ".3f"),
    _Field("validation/accuracy", "validation", "val", ".3f"),
    _Field("rollout/length", "length", "len", ".1f"),
    _Field("policy/entropy", "entropy", "ent", ".3f"),
    _Field("policy/kl_initial", "KL to initial", "kl", ".2g"),
    _Field("optimizer/grad_norm", "gradient norm", "grad", ".2g"),
    _Field("projection/removed_energy", "removed energy", "removed", ".0%"),
    _Field("projection/clamp_rate", "clamp rate", "", ".0%"),
    _Field("rollout/truncated", "truncated", "", ".0%"),
    _Field("policy/logprob_mismatch", "logprob mismatch", "", ".2g"),
    _Field("loss/policy", "policy loss", "", ".2g"),
    _Field("optimizer/lr", "learning rate", "", ".2g"),
)
# Values that only some steps have: the table keeps the last one and says of which step it is.
_KEPT = "validation/accuracy"


class Display:
    """The steps of a run on the terminal, which this context manager restores.

    On a terminal it is a bar with a table below. Elsewhere (CI, logs) every step is one plain line
    of fewer than 120 characters. Every metric is optional in any step.
    """

    def __init__(self, name: str, total_steps: int, console: Console | None = None) -> None:
        self._name = name
        self._total_steps = total_steps
        self._console = console or Console()
        self._phase = ""
        self._total = total_steps
        self._task: TaskID | None = None
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            expand=True,
            speed_estimate_period=_SPEED_WINDOW_SECONDS,
        )
        self._live: Live | None = None
        live = self._console.is_terminal and not self._console.is_dumb_terminal
        if live and logger.isEnabledFor(logging.INFO):
            self._live = Live(self._progress, console=self._console, refresh_per_second=2)
        self._kept = ""

    def start(self, phase: str, total: int | None = None, completed: int = 0) -> None:
        """Begin a phase, "warm_start" or "rl", of ``total`` steps (default: the run's).

        A resumed phase starts with ``completed`` steps, which the time left leaves out.
        """
        self._phase = _PHASES.get(phase, phase)
        self._total = self._total_steps if total is None else total
        self._kept = ""
        if self._live is None:
            self._print(
                f"{self._name}: {self._phase}, {self._total} steps; "
                "seconds are of the step (rollout/score/train)"
            )
            return
        if self._task is not None:
            self._progress.stop_task(self._task)
        self._task = self._progress.add_task(
            f"{self._name} {self._phase}", total=self._total, completed=completed
        )
        self._live.update(self._progress)
        self._live.start()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a finished step; ``step`` counts from 1 within its phase."""
        if self._live is None:
            self._print(self.line(step, metrics))
            return
        assert self._task is not None, "start a phase before the first update"
        self._progress.update(self._task, completed=step)
        self._live.update(Group(self._progress, self._table(step, metrics)), refresh=True)

    def message(self, text: str) -> None:
        """Print ``text`` as it is, above the live display if there is one."""
        self._print(text)

    def stop(self) -> None:
        """End the live display and leave its last state on screen; safe to call twice."""
        if self._live is not None:
            self._live.stop()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def line(self, step: int, metrics: Mapping[str, float]) -> str:
        """Put a step in at most `MAX_LINE` characters; what does not fit at the end is left out."""
        parts = [f"{self._phase} {step}/{self._total}".strip()]
        parts += [
            f"{field.short} {_number(metrics[field.key], field.spec)}"
            for field in _FIELDS
            if field.short and field.key in metrics
        ]
        seconds = _seconds(metrics)
        if "step" in seconds:
            inner = "/".join(
                _number(seconds[name], ".1f") if name in seconds else "-"
                for name in ("rollout", "score", "train")
            )
            whole = f"{_number(seconds['step'], '.1f')}s"
            parts.append(whole if inner == "-/-/-" else f"{whole} ({inner})")
        if "tokens/second" in metrics:
            parts.append(f"{_thousands(metrics['tokens/second'])} tok/s")
        line = parts[0]
        for part in parts[1:]:
            if len(line) + 1 + len(part) > MAX_LINE:
                break
            line = f"{line} {part}"
        return line

    def _table(self, step: int, metrics: Mapping[str, float]) -> Table:
        """Build a table of name and value cells, then the seconds of each part of the step."""
        cells: list[tuple[str, str]] = []
        for field in _FIELDS:
            if field.key not in metrics:
                if field.key == _KEPT and self._kept:
                    cells.append((field.label, self._kept))
                continue
            value = _number(metrics[field.key], field.spec)
            if field.key == "reward/mean" and "reward/std" in metrics:
                value += f" ± {_number(metrics['reward/std'], '.2f')}"
            cells.append((field.label, value))
            if field.key == _KEPT:
                self._kept = f"{value} (step {step})"
        if "tokens/second" in metrics:
            cells.append(("tokens/s", _thousands(metrics["tokens/second"])))

        grid = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(_CELLS_PER_ROW):
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(no_wrap=True, min_width=8)
        for first in range(0, len(cells), _CELLS_PER_ROW):
            row = cells[first : first + _CELLS_PER_ROW]
            grid.add_row(*(text for cell in row for text in cell))

        whole = Table.grid(padding=(0, 0))
        whole.add_row(grid)
        seconds = [f"{name} {_number(s, '.2f')}" for name, s in _seconds(metrics).items()]
        if seconds:
            whole.add_row(Text.assemble(("seconds  ", "dim"), " · ".join(seconds)))
        return whole

    def _print(self, text: str) -> None:
        logger.info("%s", text, extra={"show": self._show})

    def _show(self, line: str) -> None:
        # soft_wrap: a line of a log is one line, however narrow rich thinks that the file is. Rich
        # flushes after each print.
        self._console.print(Text(line), soft_wrap=True)


def _seconds(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return seconds by phase name, "step" (the whole) last."""
    found = {
        key.removeprefix("seconds/"): value
        for key, value in metrics.items()
        if key.startswith("seconds/")
    }
    if "step" in found:
        found["step"] = found.pop("step")
    return found


def _number(value: float, spec: str) -> str:
    """Format ``value`` by ``spec``, or with two digits where that is long (a diverged run)."""
    text = format(value, spec)
    return text if len(text) <= 7 else format(value, ".1e")


def _thousands(value: float) -> str:
    if abs(value) >= 1e6:
        return _number(value / 1e6, ".1f") + "M"
    return _number(value / 1e3, ".1f") + "k" if abs(value) >= 1e4 else _number(value, ".0f")
