"""A run that is asked to stop, suspended, or out of time; and rewards that don't come."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from support.drills import LAYOUTS, TINY, Dice, Drill, Fault, send, sentence
from support.ledger import record
from support.losses import differences
from support.rewards import MOOD

from proma_megatron.config.constants import EXIT_STOPPED
from proma_megatron.processes.stopping import read_stop

USR1 = partial(send, signal.SIGUSR1)
Undisturbed = Callable[..., Drill]
TORCHRUN = frozenset({"torchrun"})

# One after the other in the same run. The second validation of a run follows a step that is done:
# its row waits in the checkpoint.
CHAINS = {
    "TP2": [("warm_start", 1), ("rollout", 2), ("validation", 1)],
    "PP2": [("validation", 1), ("train", 1), ("save", 1)],
    "DP2": [("setup", 1), ("rollout", 1), ("kl", 1)],
}
PHASES = (
    *(("setup", 2), ("warm_start", 1), ("warm_start", 2), ("validation", 1), ("validation", 2)),
    *(("rollout", 2), ("score", 2), ("reference", 2), ("kl_lagged", 2), ("train", 2), ("kl", 2)),
    *(("save", 1), ("save", 3), ("write", 2)),
)


def stop(drill: Drill, layout: str, fault: Fault, signal_name: str) -> Callable[[list[str]], None]:
    """Let it happen, and see that the run says so; what to call when the loss is known."""
    print(layout, fault)
    done = drill.go(fault)
    said = sentence(done)
    assert done.returncode == EXIT_STOPPED, (said, done.stdout)
    assert said == str(read_stop(drill.run_dir.logs))
    assert said.startswith(f"stopped by {signal_name}")
    return lambda lost: record(
        f"{signal_name} to a rank", fault.phase, layout, done.returncode, said, lost
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stopped_again_and_again_it_loses_nothing(
    layout: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    # Without retention: what a stop saves would count for it.
    keep = "trainer.keep_last=null"
    dice, drill = Dice(), Drill(tmp_path, (*TINY, *LAYOUTS[layout], keep))
    notes = [
        stop(drill, layout, Fault(phase, dice.rank(phase), at, 0.0, USR1), "SIGUSR1")
        for phase, at in CHAINS[layout]
    ]
    drill.finish()
    lost = differences(undisturbed(layout).run_dir, drill.run_dir)
    for note in notes:
        note(lost)
    assert not lost


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
@pytest.mark.parametrize(("phase", "at"), PHASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stopped_anywhere_it_loses_nothing(
    layout: str, phase: str, at: int, name: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    # Our own launcher passes SIGTERM on as SIGUSR1; torchrun's ranks get it as it is.
    options = TORCHRUN if name == "SIGTERM" else frozenset[str]()
    drill = Drill(tmp_path, (*TINY, *LAYOUTS[layout], "trainer.keep_last=null"), options)
    dice = Dice()
    action = partial(send, signal.Signals[name])
    note = stop(drill, layout, Fault(phase, dice.rank(phase), at, dice.delay(0.1), action), name)
    drill.finish()
    lost = differences(undisturbed(layout).run_dir, drill.run_dir)
    note(lost)
    assert not lost


def an_hour_passes() -> None:
    """For whoever asks how much time is left."""
    from proma_megatron.processes.stopping import StopAgreement

    before = StopAgreement.time_left
    StopAgreement.time_left = lambda self: before(self) - 3600  # type: ignore[method-assign]


def test_out_of_time_it_loses_nothing(undisturbed: Undisturbed, tmp_path: Path) -> None:
    drill = Drill(tmp_path, (*TINY, *LAYOUTS["DP2"], "trainer.keep_last=null"))
    limit = ["trainer.max_minutes=30"]
    done = drill.go(Fault("rollout", 0, 2, 0.0, an_hour_passes), overrides=limit)
    assert done.returncode == EXIT_STOPPED, done.stderr
    assert sentence(done).startswith("stopped by trainer.max_minutes=30 after step 1;")
    drill.finish()
    lost = differences(undisturbed("DP2").run_dir, drill.run_dir)
    record("trainer.max_minutes reached", "rollout", "DP2", 75, sentence(done), lost)
    assert not lost


# --------------------------------------------------------------------------- hangs

LIMIT = 6.0  # seconds that a phase may take, many times what it needs


def suspend() -> None:
    Path("suspended").write_text(str(time.monotonic()))
    send(signal.SIGSTOP)


def suspend_for_a_second() -> None:
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {os.getpid()}"])
    send(signal.SIGSTOP)


HANGS = [
    pytest.param("TP2", "train", 1),
    *(
        pytest.param(layout, phase, rank, marks=pytest.mark.slow)
        for layout in LAYOUTS
        for phase in ("rollout", "train", "kl", "validation", "warm_start")
        for rank in (0, 1)
        if (layout, phase, rank) != ("TP2", "train", 1)
    ),
]


@pytest.mark.parametrize(("layout", "phase", "rank"), HANGS)
def test_a_suspended_rank_ends_the_run_and_is_named(
    layout: str, phase: str, rank: int, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    drill = Drill(tmp_path, (*TINY, *LAYOUTS[layout]))
    # A peer may be through with its part of the phase, and wait in a later one.
    names = ("warm_start", "rollout", "score", "reference", "train", "kl", "validation", "save")
    limits = [f"trainer.phase_minutes.{name}={LIMIT / 60}" for name in names]
    done = drill.go(Fault(phase, rank, 2, 0.0, suspend), overrides=limits)
    waited = time.monotonic() - float((tmp_path / "suspended").read_text())
    said = sentence(done)
    assert done.returncode == 1, said
    assert f"rank {1 - rank} has spent" in said
    assert f"rank {rank} wrote none: it is stopped (state T)" in said
    assert waited < LIMIT + 15
    drill.finish()
    lost = differences(undisturbed(layout).run_dir, drill.run_dir)
    record("SIGSTOP of a rank", phase, layout, 1, said, lost)
    assert not lost


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_that_is_suspended_for_a_while_goes_on(
    layout: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    drill = Drill(tmp_path, (*TINY, *LAYOUTS[layout]))
    drill_faults = [Fault("train", 1, 2, 0.01, suspend_for_a_second)]
    assert drill.go(*drill_faults).returncode == 0
    lost = differences(undisturbed(layout).run_dir, drill.run_dir)
    record("SIGSTOP, and SIGCONT a second later", "train", layout, 0, "", lost)
    assert not lost


# --------------------------------------------------------------------------- rewards

MOODS = {
    "raise": "the reward function raised ValueError: no answer key on problem",
    "crash": r"ended with signal 11 (SIGSEGV), expected a finite number",
    "hang": "in phase score of step 2, more than trainer.phase_minutes.score=0.1 allows",
}


@pytest.mark.parametrize(
    ("layout", "mood"),
    [
        pytest.param(layout, mood, marks=() if layout == first else pytest.mark.slow)
        # One that hangs is in processes/test_watchdog.py.
        for mood, first in zip(MOODS, ("TP2", "DP2", None), strict=True)
        for layout in LAYOUTS
    ],
)
def test_a_reward_that_does_not_come_ends_the_run_until_it_does(
    layout: str, mood: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    rewards = ("reward={function: 'support.rewards:moody', timeout_seconds: 1000, workers: 1}",)
    drill = Drill(tmp_path, (*TINY, *rewards, *LAYOUTS[layout]), frozenset({"scoring"}))
    limit = ["trainer.phase_minutes.score=0.1"] if mood == "hang" else []
    turn = partial(MOOD.write_text, mood)
    done = drill.go(Fault("score", 0, 2, 0.0, turn), overrides=limit)
    said = sentence(done)
    assert done.returncode == 1, done.stdout
    assert MOODS[mood] in said
    if mood != "hang":
        assert (drill.run_dir.unscored(2)).is_file()
    (tmp_path / MOOD).unlink()
    drill.finish()
    lost = differences(undisturbed(layout).run_dir, drill.run_dir)
    words = {"raise": "raises", "crash": "crashes its process", "hang": "hangs"}[mood]
    record(f"reward function that {words}", "score", layout, 1, said, lost)
    assert not lost
