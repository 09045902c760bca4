"""What a comparison leaves: a figure in three files, its recipe, and a table on the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from proma_megatron.commands.compare.runs import Comparison
from proma_megatron.errors import ConfigError
from proma_megatron.figures.files import write_figure
from proma_megatron.figures.panels import PAPER, Panel
from proma_megatron.figures.runs import Group, Run, read_run
from proma_megatron.figures.series import at_end, step_seconds
from proma_megatron.figures.words import seconds, spread
from proma_megatron.files import atomic_write
from proma_megatron.runs.environment import describe_environment


def write_recipe(comparison: Comparison, command: str) -> None:
    """Write compare.json: what was asked for, and by which versions."""
    device = comparison.runs[0].config.device
    recipe = {
        "command": command,
        "algorithms": comparison.algorithms,
        "seeds": comparison.seeds,
        "steps": comparison.runs[0].config.trainer.steps,
        "runs": [planned.config.name for planned in comparison.runs],
        **describe_environment(device),
    }
    with atomic_write(comparison.folder / "compare.json") as part:
        part.write_text(json.dumps(recipe, indent=2) + "\n")


def draw_comparison(comparison: Comparison, command: str) -> tuple[Path, Path, Path]:
    """Draw compare.png, .csv and .html of the runs that have made RL steps; return their paths."""
    return write_figure(
        comparison.folder / "compare.png",
        f"{comparison.folder.name}: {', '.join(comparison.algorithms)}",
        groups_of(comparison),
        PAPER,
        columns=2,
        command=command,
    )


def groups_of(comparison: Comparison) -> list[Group]:
    """Return one group an algorithm, in their order, without the runs that have no RL step yet."""
    runs: dict[str, list[Run]] = {algorithm: [] for algorithm in comparison.algorithms}
    for planned in comparison.runs:
        try:
            runs[planned.algorithm].append(read_run(planned.config.run_dir))
        except ConfigError:  # has not started
            continue
    return [Group(algorithm, tuple(found)) for algorithm, found in runs.items() if found]


def print_results(groups: Sequence[Group], console: Console) -> None:
    """Print the final values, mean [lowest, highest] over the seeds, and the cost of a step."""
    table = Table(title="At the end", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("algorithm")
    for heading in ("seeds", *(_heading(panel) for panel in PAPER), "s/step"):
        table.add_column(heading, justify="right")
    for group in groups:
        table.add_row(
            group.label,
            str(len(group.runs)),
            *(spread(at_end(group, panel.key, panel.last), digits=3) for panel in PAPER),
            seconds(step_seconds(group)),
        )
    console.print(table)
    console.print("mean [lowest, highest] of the seeds", markup=False)


def _heading(panel: Panel) -> str:
    return panel.short if panel.last == 1 else f"{panel.short}, last {panel.last}"
