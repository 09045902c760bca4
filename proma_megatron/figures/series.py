"""Values of a group of runs, step by step, and the numbers that sum them up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from proma_megatron.figures.runs import Group, Run

RUNNING_MEAN_STEPS = 10


@dataclass(frozen=True)
class Spread:
    """Values of some runs, and what a line and its band show of them."""

    values: tuple[tuple[str, float], ...]  # member of the group, value

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return math.fsum(value for _, value in self.values) / self.n

    @property
    def low(self) -> float:
        return min(value for _, value in self.values)

    @property
    def high(self) -> float:
        return max(value for _, value in self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1); None of a single value."""
        if self.n < 2:
            return None
        mean = self.mean
        return math.sqrt(math.fsum((v - mean) ** 2 for _, v in self.values) / (self.n - 1))


@dataclass(frozen=True)
class Point(Spread):
    """The values at one step, of those runs that have one there."""

    step: int


@dataclass(frozen=True)
class Series:
    """One metric of one group."""

    label: str
    points: tuple[Point, ...]  # by ascending step

    @property
    def steps(self) -> list[int]:
        return [point.step for point in self.points]

    @property
    def banded(self) -> bool:
        """Whether there is more than a line to show."""
        return any(point.n > 1 for point in self.points)


def series(group: Group, key: str) -> Series:
    """Return ``key`` over the steps at which any run of the group has it."""
    at: dict[int, list[tuple[str, float]]] = {}
    for member, run in zip(group.members, group.runs, strict=True):
        for step, value in run.values(key):
            at.setdefault(step, []).append((member, value))
    return Series(group.label, tuple(Point(tuple(at[step]), step) for step in sorted(at)))


def at_end(group: Group, key: str, last: int = 1) -> Spread | None:
    """Return the spread of each run's mean of its last so many values; None if no run has one."""
    found = []
    for member, run in zip(group.members, group.runs, strict=True):
        values = [value for _, value in run.values(key)][-last:]
        if values:
            found.append((member, math.fsum(values) / len(values)))
    return Spread(tuple(found)) if found else None


def step_seconds(group: Group) -> Spread | None:
    """Return the spread of each run's mean seconds of an RL step; None if no run has them."""
    found = []
    for member, run in zip(group.members, group.runs, strict=True):
        values = [value for _, value in run.values("seconds/step")]
        if values:
            found.append((member, math.fsum(values) / len(values)))
    return Spread(tuple(found)) if found else None


def shares(runs: Sequence[Run]) -> dict[str, float]:
    """Return each phase's share in the seconds of all RL steps; what no phase counted: "other"."""
    spent: dict[str, float] = {}
    for run in runs:
        for row in run.rows:
            if row.get("seconds/step") is None:
                continue
            for key, value in row.items():
                if key.startswith("seconds/") and value is not None:
                    name = key.removeprefix("seconds/")
                    spent[name] = spent.get(name, 0.0) + value
    whole = spent.pop("step", 0.0)
    if not whole:
        return {}
    found = {name: seconds / whole for name, seconds in spent.items()}
    return found | {"other": max(0.0, 1 - math.fsum(found.values()))}


def running_mean(values: np.ndarray, window: int = RUNNING_MEAN_STEPS) -> np.ndarray:
    """Return (n,) means, each of a value of (n,) and up to ``window - 1`` before it."""
    starts = np.maximum(np.arange(len(values)) - window + 1, 0)
    return np.array([values[start : i + 1].mean() for i, start in enumerate(starts)])
