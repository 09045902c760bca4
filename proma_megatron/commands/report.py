"""`proma report`: the curves of one or several runs, and the few numbers that sum a run up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from proma_megatron.errors import ConfigError
from proma_megatron.figures.files import write_figure
from proma_megatron.figures.panels import ALL
from proma_megatron.figures.runs import read_groups, rl_rows
from proma_megatron.observability.metrics import read_metrics
from proma_megatron.runs.directory import RunDir


def report(runs: Sequence[Path], out: Path | None, command: str) -> None:
    """Draw the runs, and print each in five numbers and which files were written.

    Args:
        out: the PNG; None: ``report.png`` in the first run's directory.
        command: what was typed, for the page.

    Raises:
        ConfigError: as `draw_report`.
    """
    files = draw_report(runs, out or runs[0] / "report.png", command)
    for run in runs:
        figures = ", ".join(f"{key} {value:.3f}" for key, value in summarize(run).items())
        print(f"{run}: {figures}")
    print(f"wrote {', '.join(str(path) for path in files)}")


def draw_report(
    runs: Sequence[Path], out: Path, command: str | None = None
) -> tuple[Path, Path, Path]:
    """Draw ``runs`` over RL steps: the paper's four panels, training reward and removed energy.

    Runs that differ in nothing but the seed become one line with a band.

    Args:
        out: the PNG; a CSV and an HTML file of the same stem are written next to it.
        command: what was typed, for the page.

    Returns:
        The files.

    Raises:
        ConfigError: no run is given, one has no RL step, or ``out`` can't be written.
    """
    groups = read_groups(runs)
    if out.suffix.lower() != ".png":
        raise ConfigError(
            f"--out is {out}, expected a name that ends in .png; CSV and HTML files of the same "
            "stem are written next to it"
        )
    title = ", ".join(group.label for group in groups)
    try:
        return write_figure(out, title, groups, ALL, columns=3, smooth=True, command=command)
    except OSError as error:
        raise ConfigError(
            f"--out is {out}, which can't be written ({error.strerror}); give a place where files "
            "can be made"
        ) from None


def summarize(run: Path) -> dict[str, float]:
    """Return a run in five numbers; NaN where it recorded none.

    ``reward/first``, ``reward/last_ten`` (mean of the last ten RL steps), ``validation/first`` and
    ``validation/last`` accuracy in RL, and ``seconds/total`` of all steps, the warm start and
    steps that a resumed run repeated included.

    Raises:
        ConfigError: there is no metrics.jsonl, or no RL step in it.
    """
    rows = rl_rows(run)
    reward = [row["reward/mean"] for row in rows if row.get("reward/mean") is not None]
    accuracy = [
        row["validation/accuracy"] for row in rows if row.get("validation/accuracy") is not None
    ]
    seconds = [row.get("seconds/step") for row in read_metrics(RunDir(run).metrics)]
    spent = [value for value in seconds if value is not None]
    nan = float("nan")
    return {
        "reward/first": reward[0] if reward else nan,
        "reward/last_ten": float(np.mean(reward[-10:])) if reward else nan,
        "validation/first": accuracy[0] if accuracy else nan,
        "validation/last": accuracy[-1] if accuracy else nan,
        "seconds/total": float(sum(spent)) if spent else nan,
    }
