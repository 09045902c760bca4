"""A rank is killed somewhere; the run goes on, and ends as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
from support.drills import LAYOUTS, MAIN, MOMENTS, TINY, Dice, Drill, Fault, sentence
from support.ledger import record
from support.losses import differences

# Phases and how often the run goes through them before it is killed. A run with three kills gets a
# step further each time.
CHAINS = {
    "TP2": [("warm_start", 2), ("train", 2), ("write", 2)],
    "PP2": [("rollout", 2), ("marker", 2), ("validation", 1)],
    "DP2": [("setup", 2), ("save", 3), ("score", 2), ("kl", 2)],
}
PHASES = (
    *(("setup", 1), ("setup", 2), ("warm_start", 1), ("warm_start", 2), ("validation", 1)),
    *(("rollout", 2), ("score", 2), ("reference", 2), ("kl_lagged", 2), ("train", 2), ("kl", 2)),
    *(("validation", 2), ("save", 1), ("save", 3), ("report", 5)),
    *(("write", 1), ("write", 3), ("index", 3), ("marker", 1), ("marker", 3), ("links", 3)),
    *(("removal", 1), ("removal", 2)),
)
WORDS = {
    "write": "background write of a checkpoint",
    "index": "files written, no marker yet",
    "marker": "marker of a checkpoint",
    "links": "links to checkpoints",
    "removal": "removal of a checkpoint",
    "report": "a row of metrics.jsonl",
}


def kill(drill: Drill, layout: str, fault: Fault) -> Callable[[list[str]], None]:
    """Let it happen, and see that the run says so; what to call when the loss is known."""
    print(layout, fault)
    done = drill.go(fault)
    said = sentence(done)
    assert done.returncode == 1, (said, done.stdout)
    assert f"rank {fault.rank} was ended by signal 9 (SIGKILL" in said
    when = WORDS.get(fault.phase, fault.phase)
    return lambda lost: record("SIGKILL of a rank", when, layout, done.returncode, said, lost)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_again_and_again_it_loses_nothing(
    layout: str, undisturbed: Callable[..., Drill], tmp_path: Path
) -> None:
    dice, drill = Dice(), Drill(tmp_path, (*TINY, *LAYOUTS[layout]))
    notes = [
        kill(drill, layout, Fault(phase, dice.rank(phase), time, dice.delay()))
        for phase, time in CHAINS[layout]
    ]
    drill.finish()
    lost = differences(undisturbed(layout).run_dir, drill.run_dir)
    for note in notes:
        note(lost)
    assert not lost


def everywhere() -> Iterator[tuple[str, str, int, int, bool]]:
    """Layout, phase, how often it has been entered, rank, and whether saves are in the background.

    Of phases that have nothing to do with saving only the latter.
    """
    for layout, (phase, time), rank in product(LAYOUTS, PHASES, (0, 1)):
        if not rank or phase not in MAIN:
            yield layout, phase, time, rank, True
            if phase in ("save", *MOMENTS):
                yield layout, phase, time, rank, False


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "phase", "time", "rank", "background"), everywhere())
def test_killed_anywhere_it_loses_nothing(
    layout: str,
    phase: str,
    time: int,
    rank: int,
    background: bool,
    undisturbed: Callable[..., Drill],
    tmp_path: Path,
) -> None:
    how = () if background else ("trainer.save_in_background=false",)
    drill = Drill(tmp_path, (*TINY, *LAYOUTS[layout], *how))
    note = kill(drill, layout, Fault(phase, rank, time, Dice().delay()))
    drill.finish()
    lost = differences(undisturbed(layout).run_dir, drill.run_dir)
    note(lost)
    assert not lost
