"""Somebody sets the clock while a run goes on."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from support.drills import LAYOUTS, TINY, Drill, Fault
from support.ledger import record
from support.losses import differences

DAY = 86400.0


def jump(seconds: float) -> None:
    """From now on all clocks that can be set are this much ahead, in this process."""
    now, now_ns, real = time.time, time.time_ns, datetime.datetime
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)

    class Jumped(real):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return real.now(tz) + datetime.timedelta(seconds=seconds)

    datetime.datetime = Jumped  # type: ignore[misc]


@pytest.mark.parametrize(
    "layout", ["TP2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("PP2", "DP2"))]
)
def test_a_clock_that_jumps_changes_nothing(
    layout: str, undisturbed: Callable[..., Drill], tmp_path: Path
) -> None:
    drill = Drill(tmp_path, (*TINY, *LAYOUTS[layout]))
    jumps = [
        Fault(phase, rank, 2, 0.0, partial(jump, sign * DAY))
        for phase, ahead in (("rollout", 1), ("kl", -2))
        for rank, sign in ((0, ahead), (1, -ahead))
    ]
    limits = ["trainer.max_minutes=30", "trainer.phase_minutes={train: 10, rollout: 10}"]
    done = drill.go(*jumps, overrides=limits)
    assert done.returncode == 0, done.stderr
    lost = differences(undisturbed(layout).run_dir, drill.run_dir)
    record("clock set a day ahead, and two back", "rollout, kl", layout, 0, "", lost)
    assert not lost
