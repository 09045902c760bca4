"""Metrics on disk are valid, complete and survive a kill; the stopwatch adds up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proma_megatron.observability.metrics import MetricsWriter, read_metrics
from proma_megatron.observability.timing import Stopwatch
from proma_megatron.runs.directory import RunDir, prepare_run_dir
from proma_megatron.types import StepReport


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return prepare_run_dir(tmp_path / "run", resume=False, overwrite=False)


def _strict(line: str) -> dict[str, Any]:
    """Parse by the JSON standard, which has no NaN or Infinity."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return json.loads(line, parse_constant=refuse)


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_rows_round_trip_and_are_on_disk_at_once(run_dir: RunDir) -> None:
    with MetricsWriter(run_dir) as writer:
        writer.write(StepReport(1, {"loss/supervised": 2.5}), phase="warm_start")
        writer.write(StepReport(1, {"reward/mean": 0.25, "loss/policy": -0.5}), phase="rl")
        rows = read_metrics(run_dir.metrics)  # before the writer is closed
    assert rows == [
        {"step": 1, "phase": "warm_start", "loss/supervised": 2.5},
        {"step": 1, "phase": "rl", "reward/mean": 0.25, "loss/policy": -0.5},
    ]
    assert list(rows[1])[:2] == ["step", "phase"]


def test_not_a_number_is_null(run_dir: RunDir) -> None:
    metrics = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0, "e": float(np.float32(2))}
    samples = ({"reward": math.nan, "logprobs": [-1.0, -math.inf], "text": "hm"},)
    with MetricsWriter(run_dir) as writer:
        writer.write(StepReport(3, metrics, samples), phase="rl")
    row = _strict(run_dir.metrics.read_text())
    assert row == {"step": 3, "phase": "rl", "a": None, "b": None, "c": None, "d": 1.0, "e": 2.0}
    sample = _strict(run_dir.samples.read_text())
    assert sample["reward"] is None
    assert sample["logprobs"] == [-1.0, None]


def test_numpy_scalars_are_numbers(run_dir: RunDir) -> None:
    metrics: dict[str, Any] = {"a": np.float32(0.5), "b": np.float32(np.nan)}
    with MetricsWriter(run_dir) as writer:
        writer.write(StepReport(1, metrics), phase="rl")
    assert _strict(run_dir.metrics.read_text()) == {"step": 1, "phase": "rl", "a": 0.5, "b": None}


@pytest.mark.parametrize("text", ["two\nlines", "\u2028 \x85", "π = 3", "torn \ud800 token"])
def test_sampled_text_stays_one_line_and_whole(run_dir: RunDir, text: str) -> None:
    with MetricsWriter(run_dir) as writer:
        writer.write(StepReport(7, {}, ({"text": text}, {"text": "b"})), phase="rl")
    assert read_metrics(run_dir.samples) == [
        {"step": 7, "phase": "rl", "text": text},
        {"step": 7, "phase": "rl", "text": "b"},
    ]


def test_tensorboard_has_finite_scalars_of_each_phase(
    run_dir: RunDir, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with MetricsWriter(run_dir) as writer:
        writer.write(StepReport(1, {"loss": 4.0}), phase="warm_start")
        writer.write(StepReport(1, {"loss": 2.0, "kl": math.nan}), phase="rl")
        writer.write(StepReport(2, {"loss": 1.0, "kl": 0.5}), phase="rl")
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert _scalars(run_dir.tensorboard / "warm_start") == {"loss": [(1, 4.0)]}
    assert _scalars(run_dir.tensorboard / "rl") == {"loss": [(1, 2.0), (2, 1.0)], "kl": [(2, 0.5)]}


def test_resumed_run_replaces_repeated_steps_on_tensorboard(run_dir: RunDir) -> None:
    with MetricsWriter(run_dir) as writer:
        for step in (1, 2, 3):
            writer.write(StepReport(step, {"loss": 1.0}), phase="rl")
    with MetricsWriter(run_dir) as writer:
        writer.write(StepReport(2, {"loss": 5.0}), phase="rl")
    assert _scalars(run_dir.tensorboard / "rl") == {"loss": [(1, 1.0), (2, 5.0)]}
    assert [row["step"] for row in read_metrics(run_dir.metrics)] == [1, 2, 3, 2]


@pytest.mark.parametrize("tail", [b'{"step": 3, "reward/me', b'{"step": 3, "a": "\xc3', b"{"])
def test_half_written_last_line_is_dropped(run_dir: RunDir, tail: bytes) -> None:
    run_dir.metrics.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail)
    assert read_metrics(run_dir.metrics) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    ("tail", "steps"), [(b'{"step": 2, "rew', [1, 5]), (b'{"step": 2}', [1, 2, 5]), (b"", [1, 5])]
)
def test_resumed_run_writes_after_a_clean_end(
    run_dir: RunDir, tail: bytes, steps: list[int]
) -> None:
    run_dir.metrics.write_bytes(b'{"step": 1}\n' + tail)
    with MetricsWriter(run_dir) as writer:
        writer.write(StepReport(5, {}), phase="rl")
    assert [row["step"] for row in read_metrics(run_dir.metrics)] == steps


@pytest.mark.parametrize("broken", ['{"step": 2, "rew', "", "[1]", "3"])
def test_broken_line_elsewhere_is_an_error_with_its_number(run_dir: RunDir, broken: str) -> None:
    run_dir.metrics.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        read_metrics(run_dir.metrics)


def test_empty_file_has_no_rows(run_dir: RunDir) -> None:
    run_dir.metrics.write_text("")
    assert read_metrics(run_dir.metrics) == []


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


def _spend(stopwatch: Stopwatch, clock: _Clock, name: str, seconds: float) -> None:
    with stopwatch.phase(name):
        clock.now += seconds


def test_stopwatch_accumulates_and_resets(clock: _Clock) -> None:
    stopwatch = Stopwatch(clock)
    _spend(stopwatch, clock, "rollout", 2.0)
    clock.now += 10.0  # outside of any phase
    _spend(stopwatch, clock, "train", 1.0)
    _spend(stopwatch, clock, "rollout", 3.0)
    assert stopwatch.seconds() == {"seconds/rollout": 5.0, "seconds/train": 1.0}
    assert stopwatch.seconds() == {}


def test_outer_phase_includes_inner_ones(clock: _Clock) -> None:
    stopwatch = Stopwatch(clock)
    with stopwatch.phase("step"):
        clock.now += 1.0
        _spend(stopwatch, clock, "train", 2.0)
        with stopwatch.phase("step"):  # counts once
            clock.now += 4.0
    assert stopwatch.seconds() == {"seconds/step": 7.0, "seconds/train": 2.0}


def test_reset_inside_a_phase_leaves_it_for_the_next_call(clock: _Clock) -> None:
    stopwatch = Stopwatch(clock)
    with stopwatch.phase("step"):
        _spend(stopwatch, clock, "train", 2.0)
        assert stopwatch.seconds() == {"seconds/train": 2.0}
    assert stopwatch.seconds() == {"seconds/step": 2.0}


def test_phase_that_raises_is_counted_and_closed(clock: _Clock) -> None:
    stopwatch = Stopwatch(clock)

    def fail() -> None:
        clock.now += 2.0
        raise RuntimeError("out of memory")

    _raises_in_phase(stopwatch, fail)
    assert stopwatch.seconds() == {"seconds/train": 2.0}
    _spend(stopwatch, clock, "train", 1.0)
    assert stopwatch.seconds() == {"seconds/train": 1.0}


def _raises_in_phase(stopwatch: Stopwatch, work: Callable[[], None]) -> None:
    with pytest.raises(RuntimeError), stopwatch.phase("train"):
        work()
