"""Runs as figures see them: their RL rows, and which of them differ in nothing but the seed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proma_megatron.config.loading import read_tree
from proma_megatron.errors import ConfigError
from proma_megatron.observability.metrics import read_metrics
from proma_megatron.runs.directory import RunDir

Row = dict[str, Any]  # one line of metrics.jsonl


@dataclass(frozen=True)
class Run:
    """One run that has made, or validated before, its first RL step."""

    name: str
    rows: tuple[Row, ...]  # of RL, by ascending step
    config: Row | None = None  # None: the directory holds metrics only

    @property
    def seed(self) -> int | None:
        return None if self.config is None else self.config.get("seed")

    def values(self, key: str) -> list[tuple[int, float]]:
        """Return step and value of the rows where ``key`` is there and not null."""
        return [(row["step"], row[key]) for row in self.rows if row.get(key) is not None]


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed; one line of each figure."""

    label: str
    runs: tuple[Run, ...]

    @property
    def members(self) -> tuple[str, ...]:
        """What to call each run in the group: its seed, or its name where seeds say nothing."""
        seeds = [run.seed for run in self.runs]
        if None in seeds or len(set(seeds)) < len(seeds):
            return tuple(re.sub(r"[;=\s]", "_", run.name) for run in self.runs)
        return tuple(str(seed) for seed in seeds)


def read_run(path: Path, name: str | None = None) -> Run:
    """Read the run in this directory, which may still be going on.

    Raises:
        ConfigError: there is no metrics.jsonl, or no RL step in it.
    """
    run_dir = RunDir(path)
    config = read_tree(run_dir.config) if run_dir.config.is_file() else None
    return Run(name or path.resolve().name, tuple(rl_rows(path)), config)


def rl_rows(path: Path) -> list[Row]:
    """Return a run's RL rows by ascending step; of a step that a resumed run repeated, the last.

    Raises:
        ConfigError: there is no metrics.jsonl, or no RL step in it.
    """
    metrics = RunDir(path).metrics
    if not metrics.is_file():
        raise ConfigError(f"{path} has no metrics.jsonl; give the directory of a run that started")
    by_step = {row["step"]: row for row in read_metrics(metrics) if row.get("phase") == "rl"}
    if not by_step:
        raise ConfigError(f"{metrics} has no RL steps yet; wait for the first one, then report")
    return [by_step[step] for step in sorted(by_step)]


def read_groups(paths: Sequence[Path]) -> list[Group]:
    """Read these runs in groups, in the order of their first members; each run counts once.

    Runs of one group have the same configuration but for ``seed``, ``name`` and ``root``. A group
    of one is called as its directory, a larger one as its algorithm, as long as that tells it from
    the others.

    Raises:
        ConfigError: no run is given, or one has no RL step.
    """
    if not paths:
        raise ConfigError("no run is given to report on; name at least one run directory")
    distinct = list(dict.fromkeys(path.resolve() for path in paths))
    runs = [read_run(path, name) for path, name in zip(distinct, _names(distinct), strict=True)]
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(_recipe(run), []).append(run)
    groups = [tuple(members) for members in alike.values()]
    labels = list(_labels(groups))
    return [Group(label, members) for label, members in zip(labels, groups, strict=True)]


def _recipe(run: Run) -> str:
    """Return everything in the configuration but what seeds of one experiment differ in."""
    if run.config is None:
        return run.name  # nothing is known of it, so it is like no other
    tree = {key: run.config[key] for key in run.config if key not in ("seed", "name", "root")}
    return json.dumps(tree, sort_keys=True, default=str)


def _labels(groups: Sequence[tuple[Run, ...]]) -> Iterator[str]:
    algorithms = [_algorithm(runs) for runs in groups]
    taken: set[str] = set()
    for runs, algorithm in zip(groups, algorithms, strict=True):
        candidates = [_shared_name(runs), f"{runs[0].name}, ..."]
        if len(runs) == 1:
            candidates = [runs[0].name]
        elif algorithms.count(algorithm) == 1:
            candidates.insert(0, algorithm)
        label = next((c for c in candidates if c and c not in taken), f"group {len(taken) + 1}")
        taken.add(label)
        yield label


def _algorithm(runs: Sequence[Run]) -> str:
    """Return the algorithm of a group of several, "" of one, which is called otherwise."""
    config = runs[0].config
    return "" if config is None or len(runs) == 1 else str(config.get("algorithm", ""))


def _shared_name(runs: Sequence[Run]) -> str:
    """Return the name that runs share without seeds: "ridge" of "ridge_seed1" and "ridge_seed2"."""
    names = {re.sub(r"[._/-]*(seed|s)?[._-]*\d*$", "", run.name) for run in runs}
    return names.pop() if len(names) == 1 else ""


def _names(paths: Sequence[Path]) -> list[str]:
    """Return directory names, with their parents' where two are alike."""
    names = [path.name for path in paths]
    return [
        path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}"
        for path in paths
    ]
