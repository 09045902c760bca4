"""A run goes on in another layout, or with another budget: the next step is the same step."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.drills import LAYOUTS, TINY, Dice, Drill, Fault, sentence
from support.ledger import record
from support.losses import differences, values
from support.pooled import untimed

from proma_megatron.observability.metrics import read_metrics
from proma_megatron.runs.directory import RunDir

Undisturbed = Callable[..., Drill]
FLOAT64 = ("model.dtype=float64", "trainer.keep_last=null")
# A sum over replicas or microbatches is the same in any order; a projection is not, for it goes by
# the microbatches that each replica has: PROMA is another method with other ones.
PLAIN = (*FLOAT64, "algorithm=reinforce")
ONE = "parallel={tensor: 1, pipeline: 1, data: 1}"
TOLERANCE = 1e-9


def largest_error(expected: RunDir, found: RunDir, step: int) -> tuple[float, str]:
    """Of anything in the step's row and checkpoint, relative to the largest value there."""
    ours, theirs = (
        next(
            untimed(r) for r in read_metrics(run.metrics) if (r["phase"], r["step"]) == ("rl", step)
        )
        for run in (expected, found)
    )
    errors = [
        (_difference(ours[key], theirs[key]), key)
        for key in ours.keys() | theirs.keys()
        if key != "phase"
    ]
    one, other = values(expected.checkpoint(step)), values(found.checkpoint(step))
    for key, value in one.items():
        if isinstance(value, torch.Tensor) and not key.startswith("random."):
            scale = max(1e-3, float(value.abs().max()))
            errors.append((float((value - other[key]).abs().max()) / scale, key))
    return max(errors)


def _difference(one: float | None, other: float | None) -> float:
    if one is None or other is None:
        return 0.0 if one is other else math.inf
    return abs(one - other) / max(1.0, abs(one))


# Pipelines and replicas change in checkpoints/test_resharding.py, too.
CHANGES = [
    pytest.param("TP2", FLOAT64, [ONE], "TP 2 -> TP 1", id="tensor"),
    pytest.param(
        "PP2",
        FLOAT64,
        [ONE, LAYOUTS["PP2"][0]],
        "PP 2 -> PP 1 -> PP 2",
        id="pipeline",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "ONE", PLAIN, ["parallel.data=2"], "DP 1 -> DP 2", id="data", marks=pytest.mark.slow
    ),
    pytest.param(
        "DP2", PLAIN, ["batching.tokens_per_microbatch=60"], "a smaller budget", id="budget"
    ),
]


@pytest.mark.parametrize(("layout", "options", "changes", "words"), CHANGES)
def test_the_next_step_is_the_same_in_another_layout(
    layout: str,
    options: tuple[str, ...],
    changes: list[str],
    words: str,
    undisturbed: Undisturbed,
    tmp_path: Path,
) -> None:
    drill = Drill(tmp_path, (*TINY, *LAYOUTS.get(layout, ()), *options))
    reference = undisturbed(layout, *options)
    # Killed in the step after each change but the last.
    done = drill.go(Fault("train", 0, 1))
    for change, at in zip(changes[:-1], (2,), strict=False):
        done = drill.go(Fault("train", 0, at), overrides=[change])
        assert done.returncode == 1
    assert "was ended by signal 9" in sentence(done)
    drill.finish(overrides=changes[-1:])
    error, where = largest_error(reference.run_dir, drill.run_dir, 3)
    print(f"{words}: {error:.1e} ({where})")
    assert error < TOLERANCE, where
    record(f"go on as {words} ({_method(options)})", "resume", layout, 0, "", [])


def _method(options: tuple[str, ...]) -> str:
    return "reinforce" if options == PLAIN else "proma"


def test_sharded_optimizer_state_goes_on_bit_by_bit(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    options = "optimizer.distributed=true"
    drill = Drill(tmp_path, (*TINY, *LAYOUTS["DP2"], options))
    dice = Dice()
    for phase, time in (("train", 2), ("write", 2)):
        fault = Fault(phase, dice.rank(phase), time, dice.delay())
        print(fault)
        assert drill.go(fault).returncode == 1
    drill.finish()
    lost = differences(undisturbed("DP2", options).run_dir, drill.run_dir)
    record("SIGKILL of a rank", "train, distributed optimizer", "DP2", 1, "", lost)
    assert not lost
