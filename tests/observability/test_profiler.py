"""The profile says where the time went, and changes nothing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from support.pool import WorkerPool
from support.pooled import TINY_RUN, rl_rows, run_in_pool

from proma_megatron.config.loading import load_config
from proma_megatron.observability.profiler import StepProfiler
from proma_megatron.runs.directory import RunDir

CPU = torch.device("cpu")


class Clock:
    """Goes on by what it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def rows(text: str, heading: str) -> list[list[str]]:
    """The words of each line below a heading, up to an empty line."""
    below = text.split(f"{heading}\n")[1].split("\n\n")[0]
    return [line.split() for line in below.splitlines()[1:]]


def one_step(profile: StepProfiler, clock: Clock, scale: float) -> None:
    with profile.phase("step"):
        with profile.phase("rollout"):
            clock.now += 3 * scale
        with profile.phase("train"):
            for _ in range(2):
                with profile.phase("forward"):
                    clock.now += scale
            clock.now += 4 * scale
        clock.now += scale
    profile.count("rollout", 30)


@pytest.fixture
def told(tmp_path: Path) -> str:
    """The profile of five steps: the first and the traced one are slow."""
    clock = Clock()
    profile = StepProfiler(tmp_path, "title", CPU, clock)
    with profile.phase("warm_start"):
        clock.now += 5
    for step, scale in enumerate((100.0, 200.0, 1.0, 2.0, 3.0), start=7):
        with profile.step(step, last=step == 11):
            one_step(profile, clock, scale)
    told = profile.finish()
    assert told is not None
    assert (tmp_path / "profile.txt").read_text() in f"{told}\n"
    return told


def test_seconds_and_shares_lie_in_each_other_and_leave_out_special_steps(told: str) -> None:
    assert rows(told, "RL steps 9 to 11, means of a step") == [
        ["whole", "20.000", "100.0%"],
        ["step", "20.000", "100.0%"],
        ["train", "12.000", "60.0%"],
        ["forward", "4.000", "20.0%"],
        ["other", "8.000", "40.0%"],
        ["rollout", "6.000", "30.0%", "5"],
        ["other", "2.000", "10.0%"],
    ]
    assert rows(told, "before RL and after it") == [["warm_start", "5.000", "100.0%"]]


def test_one_step_is_traced(told: str, tmp_path: Path) -> None:
    assert "RL step 8, slowed down by its trace" in told
    (path,) = tmp_path.glob("trace*")
    assert path.name == "trace_step_000008.json.gz"
    trace = json.loads(gzip.decompress(path.read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"whole", "step", "train", "forward"} <= names


@pytest.mark.parametrize(("steps", "traced"), [(1, 1), (2, 2)])
def test_a_short_run_is_traced_as_well(tmp_path: Path, steps: int, traced: int) -> None:
    clock = Clock()
    profile = StepProfiler(tmp_path, "title", CPU, clock)
    for step in range(1, steps + 1):
        with profile.step(step, last=step == steps):
            one_step(profile, clock, 1.0)
    told = profile.finish()
    assert told is not None
    assert f"RL step {traced}, slowed down by its trace" in told
    assert ("RL step 1, means of a step" in told) == (steps > 1)


@pytest.fixture(scope="module")
def runs(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    """A run without and with a profile."""
    folder = tmp_path_factory.mktemp("profiled")
    path = folder / "config.yaml"
    path.write_text("name: tiny\n")
    found = []
    for profile in ("false", "true"):
        changes = [f"root={folder}", f"name=profile_{profile}", f"trainer.profile={profile}"]
        changes += ["trainer={kl_every: 0, kl_step_every: 0}", "data.train_problems=20"]
        found.append(run_in_pool(workers, load_config(path, [*TINY_RUN, *changes])))
    return found


def test_a_profile_changes_no_result(runs: list[RunDir]) -> None:
    off, on = runs
    assert rl_rows(on) == rl_rows(off)
    assert on.samples.read_text() == off.samples.read_text()
    assert not [*off.logs.glob("profile*"), *off.logs.glob("trace*")]


def test_the_profile_of_a_run_has_its_phases_and_their_parts(runs: list[RunDir]) -> None:
    found = rows((runs[1].logs / "profile.txt").read_text(), "RL step 1, means of a step")
    names = [row[0] for row in found]
    parts = {"train", "backward", "projection", "forward", "optimizer", "pack"}
    assert {"whole", "step", "rollout", "score", "kl_lagged", *parts} <= set(names)
    assert names.index("train") < names.index("backward") < names.index("projection")
    rates = {row[0]: float(row[3].replace(",", "")) for row in found if len(row) > 3}
    assert rates.keys() == {"rollout", "train"}
    assert min(rates.values()) > 0
    seconds = {row[0]: float(row[1]) for row in found}
    assert seconds["train"] <= seconds["step"] <= seconds["whole"]
