"""Every algorithm trains, through the whole trainer, and says what it did."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.pool import WorkerPool
from support.pooled import TINY_RUN, rl_rows, run_in_pool

from proma_megatron.config.loading import apply_overrides, validate_config
from proma_megatron.config.run import RunConfig


@dataclass(frozen=True)
class Case:
    overrides: tuple[str, ...]
    recorded: tuple[str, ...] = ()  # metrics that it must have, beyond those of all


CASES = {
    "proma": Case(
        ("algorithm=proma", "loss.kind=cispo", "parallel.tensor=2"), ("projection/removed_energy",)
    ),
    "intra_proma": Case(
        ("algorithm=intra_proma", "projection.rank=2", "parallel.tensor=2"),
        ("projection/removed_energy",),
    ),
    "isopo": Case(
        ("algorithm=isopo", "projection.rule=norm", "parallel.data=2"),
        ("projection/effective_rank",),
    ),
    "reinforce": Case(
        (
            "algorithm=reinforce",
            "loss.entropy=0.01",
            "loss.kl={coefficient: 0.1, place: reward, estimator: k1}",
            "advantage.estimator=rloo",
        ),
        ("policy/kl_reference", "loss/kl_coefficient"),
    ),
    "ppo": Case(
        (
            "algorithm=ppo",
            "loss={dual_clip: 3, kl: {coefficient: 1, reference: rollout, target: 0.001}}",
            "advantage={estimator: leave_one_out, normalize_std: true}",
        ),
        ("loss/kl_coefficient",),
    ),
    "grpo": Case(
        ("algorithm=grpo", "loss.kl.coefficient=0.01", "parallel={tensor: 2, pipeline: 2}"),
        ("policy/kl_reference", "loss/clipped"),
    ),
    "dr_grpo": Case(("algorithm=dr_grpo", "rollout.resampling_rounds=2"), ("rollout/rounds",)),
    "cispo": Case(("algorithm=cispo", "advantage.estimator=reinforce_plus_plus")),
    "gspo": Case(
        ("algorithm=gspo", "loss.mismatch=sequence", "advantage={estimator: stratified}"),
        ("policy/mismatch_weight", "policy/mismatch_truncated"),
    ),
}


def config(root: Path, *overrides: str) -> RunConfig:
    tree: dict[str, Any] = {"name": "run", "root": str(root)}
    return validate_config(apply_overrides(tree, [*TINY_RUN, *overrides]), training=True)


@pytest.mark.parametrize("name", CASES)
def test_every_algorithm_trains(workers: WorkerPool, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    found = rl_rows(run_in_pool(workers, config(tmp_path, *case.overrides)))
    assert [row["step"] for row in found] == [0, 1, 2]
    always = ("policy/entropy", "policy/kl_initial", "policy/kl_lagged", "policy/kl_step")
    for row in found[1:]:
        for key in (*always, *case.recorded):
            assert math.isfinite(row[key]), (key, row)
    assert found[1]["policy/kl_step"] > 1e-8, "the policy did not move"
    assert found[1]["policy/kl_initial"] == pytest.approx(0, abs=1e-6)
    assert found[2]["policy/kl_initial"] > 1e-8


def test_a_resumed_run_keeps_its_lagged_policy_and_its_coefficient(
    workers: WorkerPool, tmp_path: Path
) -> None:
    def rows(name: str, *halts: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for steps in halts:
            chosen = config(
                tmp_path, *CASES["ppo"].overrides, f"name={name}", f"trainer.steps={steps}"
            )
            run = run_in_pool(workers, chosen, resume=steps != halts[0])
            found = rl_rows(run)
        return found

    whole, halved = rows("whole", 4), rows("halved", 2, 4)
    assert [row["step"] for row in halved] == [0, 1, 2, 3, 4]
    assert whole[3:] == halved[3:]
    assert len({row["loss/kl_coefficient"] for row in whole[1:]}) > 1, "it never adapted"
    assert whole[4]["policy/kl_lagged"] > 1e-8


def test_a_run_without_steps_only_makes_the_policy_that_rl_starts_from(
    workers: WorkerPool, tmp_path: Path
) -> None:
    run = run_in_pool(workers, config(tmp_path, "trainer.steps=0", "warm_start.steps=2"))
    assert run.latest_checkpoint() == run.checkpoint(0)
    assert rl_rows(run) == []


def test_groups_that_teach_nothing_are_replaced_while_rounds_last(
    workers: WorkerPool, tmp_path: Path
) -> None:
    chosen = config(
        tmp_path, "algorithm=reinforce", "rollout.resampling_rounds=3", "trainer.steps=1"
    )
    chosen = chosen.model_copy(
        update={"reward": chosen.reward.model_copy(update={"function": "support.pooled:rarely"})}
    )
    row = rl_rows(run_in_pool(workers, chosen))[-1]
    assert row["rollout/rounds"] > 1
    assert 0 < row["rollout/informative"] <= 1
    assert row["reward/equal_groups"] > 0
