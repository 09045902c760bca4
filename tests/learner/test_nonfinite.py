"""An update that is not finite is skipped on all ranks, and the microbatch to blame is found."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.gradients import TINY, VOCAB, random_batch
from support.learning import Tensors, learning
from support.nonfinite import Case, Left, Minibatch, gradient_norm, replayed, updates
from support.pool import WorkerPool
from support.pooled import TINY_RUN, rl_rows, run_in_pool
from support.slow import all_but

from proma_megatron.batching.batch_file import read_batch
from proma_megatron.batching.packing import loss_tokens
from proma_megatron.config.loading import apply_overrides, validate_config
from proma_megatron.config.model import ParallelConfig
from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.learner.learner import Learner
from proma_megatron.learner.nonfinite import NonFiniteEvent, dump
from proma_megatron.learner.references import ReferencePolicies
from proma_megatron.runs.directory import RunDir
from proma_megatron.types import TrainingSequence

HUGE = 1e160  # finite in float64, but its square is not
(FIRST,) = random_batch(20, [8], shortest=5)
(GOOD,) = random_batch(21, [8], shortest=5)
(OTHER,) = random_batch(22, [8], shortest=5)
SMALL = TINY.model_copy(update={"layers": 2})
BAD = 6  # the sequence that is spoilt: in microbatch 3 of four, the second of replica 1

LAYOUTS = {
    "TP2 SP": ParallelConfig(tensor=2, sequence=True),
    "PP2": ParallelConfig(pipeline=2),
    "PP2 VPP2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "DP2": ParallelConfig(data=2),
}
RULES = {
    "exact": "proma",
    "iterative": "proma",
    "ridge": "proma",
    "subspace": "intra_proma",
    "norm": "isopo",
    "kernel": "isopo",
}


def tree(algorithm: str = "proma", importance: str = "off", **projection: Any) -> dict[str, Any]:
    return {
        "algorithm": algorithm,
        "loss": {"importance": importance},
        "batching": {"sequences_per_microbatch": 2},
        **({"projection": projection} if projection else {}),
    }


def steep(sequence: TrainingSequence) -> TrainingSequence:
    """A gradient whose K overflows, although what the advantage leaves of it does not."""
    weights = sequence.token_weights or ()
    return replace(
        sequence,
        advantage=sequence.advantage / HUGE,
        token_weights=tuple(weight * HUGE for weight in weights),
    )


def last_weight(sequence: TrainingSequence) -> TrainingSequence:
    weights = sequence.token_weights or ()
    return replace(sequence, token_weights=(*weights[:-1], math.nan))


SPOILT = {
    "loss": lambda s: replace(s, advantage=math.nan),
    "gradient": lambda s: replace(s, advantage=HUGE),
    "projection": steep,
    "weight": last_weight,
    "ratio": lambda s: replace(s, old_logprobs=(*s.old_logprobs[:-1], -1e4)),
}


def spoilt(what: str, minibatch: Minibatch = OTHER, at: int = BAD) -> Minibatch:
    return [SPOILT[what](s) if i == at else s for i, s in enumerate(minibatch)]


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def described(offence: NonFiniteEvent) -> tuple[Any, ...]:
    counts = [len(microbatch) for microbatch in offence.microbatches]
    return offence.what, offence.replica, offence.minibatch, offence.microbatch, counts


# --------------------------------------------------------------------------- layouts


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {
        "good": Case(tree(), FIRST, [GOOD]),
        "loss": Case(tree(), FIRST, [spoilt("loss")]),
        "gradient": Case(tree(), FIRST, [GOOD, spoilt("gradient")]),
        "projection": Case(tree(), FIRST, [spoilt("projection"), GOOD]),
        "plain": Case(tree("reinforce"), FIRST, [spoilt("gradient")]),
    }


@pytest.mark.parametrize("layout", all_but(LAYOUTS, ["PP2"]))
def test_what_is_not_finite_is_skipped_and_blamed_in_every_layout(
    workers: WorkerPool, layout: str, cases: dict[str, Case]
) -> None:
    parallel = LAYOUTS[layout]
    replica, microbatch = (1, 1) if parallel.data else (0, 3)
    ranks = workers.run(
        parallel.world_size, updates, model=TINY, parallel=parallel, cases=list(cases.values())
    )
    found: list[dict[str, Left]] = [dict(zip(cases, rank, strict=True)) for rank in ranks]
    for rank in found:
        for name, left in rank.items():
            first = found[0][name]
            assert repr(left.metrics) == repr(first.metrics), "ranks disagree"
            assert list(map(repr, left.offences)) == list(map(repr, first.offences))
            assert left.metrics["optimizer/skipped"] == (name != "good")
            assert left.unchanged == (name in ("loss", "plain"))
    rank = found[0]
    chain = [2] * (microbatch + 1)
    where = (replica, 0, microbatch)
    assert list(map(described, rank["good"].offences)) == []
    assert list(map(described, rank["loss"].offences)) == [("loss", *where, [2])]
    assert list(map(described, rank["plain"].offences)) == [("gradient", *where, [2])]
    (blamed,) = rank["gradient"].offences
    assert described(blamed) == ("gradient", replica, 1, microbatch, [2])
    (blamed,) = rank["projection"].offences
    # Alone, with nothing accumulated yet, this microbatch needs no K.
    assert described(blamed) == ("projection", *where, chain)
    assert blamed.microbatches[-1][0] == spoilt("projection")[BAD]
    # The good minibatch has the effect that it has alone, and its figures.
    good = rank["good"]
    for name in ("gradient", "projection"):
        assert same(rank[name].weights, good.weights), name
        for key in ("optimizer/grad_norm", "projection/removed_energy", "policy/kl_rollout"):
            assert rank[name].metrics[key] == good.metrics[key], (name, key)
    for name in ("loss", "plain"):
        assert rank[name].empty
        assert not same(rank[name].weights, good.weights)
        assert math.isnan(rank[name].metrics["optimizer/grad_norm"])
        assert not any(key.startswith("projection/") for key in rank[name].metrics)
    # An update that is finite costs one pass and one look at its gradients.
    assert (good.passes, good.norms) == (1, 1)


# --------------------------------------------------------------------------- rules


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_crashes(workers: WorkerPool, rule: str) -> None:
    """K of ISOPO is that of a microbatch by itself; Intra-PROMA has none, and works on X and dY."""
    options: dict[str, Any] = {"rank": 2} if rule == "subspace" else {}
    settings = tree(RULES[rule], rule=rule, **options)
    # In the first microbatch nothing has been accumulated: the next ones meet what it left.
    minibatches = [spoilt("projection"), spoilt("weight", at=0)]
    ranks = workers.run(
        2,
        updates,
        model=SMALL,
        parallel=ParallelConfig(tensor=2),
        cases=[Case(settings, FIRST, [minibatch]) for minibatch in minibatches],
    )
    for found in ranks:
        assert all(left.unchanged for left in found)
        assert [left.metrics["optimizer/skipped"] for left in found] == [1, 1]
    projection, loss = (described(left.offences[0]) for left in ranks[0])
    assert projection == ("projection", 0, 0, 3, [2] * 4 if RULES[rule] == "proma" else [2])
    assert loss == ("loss", 0, 0, 0, [2])


# --------------------------------------------------------------------------- who is to blame


def scaled(factor: float, minibatch: Minibatch) -> Minibatch:
    return [replace(s, advantage=s.advantage * factor) for s in minibatch]


@pytest.fixture(scope="module")
def norm(workers: WorkerPool) -> float:
    """Of the gradient of a minibatch of `GOOD`'s first sequence and copies of it."""
    return workers.run(1, gradient_norm, model=SMALL, sequence=GOOD[0])[0]


@pytest.mark.parametrize(("replicas", "share"), [(1, 0.7), (2, 0.4)])
def test_a_sum_that_overflows_is_every_summands_fault(
    workers: WorkerPool, norm: float, replicas: int, share: float
) -> None:
    """Equal microbatches, each of which has ``share`` of what may be, squared, to itself."""
    settings = {**tree("reinforce"), "batching": {"sequences_per_microbatch": 1}}
    count = 2  # the gradient of each is half of the mean
    size = (share * torch.finfo(torch.float64).max / replicas) ** 0.5 * count
    ranks = workers.run(
        replicas,
        updates,
        model=SMALL,
        parallel=ParallelConfig(data=replicas),
        cases=[Case(settings, FIRST, [scaled(size / norm, [GOOD[0]] * count)], still=True)],
    )
    for ((left,),) in zip(ranks, strict=True):
        assert left.unchanged
        found = list(map(described, left.offences))
        chain = count // replicas
        assert found == [
            ("gradient", replica, 0, chain - 1, [1] * chain) for replica in range(replicas)
        ]


def test_a_distributed_optimizer_skips_as_well(workers: WorkerPool) -> None:
    bad = [replace(s, advantage=1e25) if at == BAD else s for at, s in enumerate(OTHER)]
    ranks = workers.run(
        2,
        updates,
        model=SMALL.model_copy(update={"dtype": "float32"}),
        parallel=ParallelConfig(data=2),
        cases=[Case(tree(), FIRST, [bad], distributed=True)],
    )
    for ((left,),) in zip(ranks, strict=True):
        assert left.unchanged
        assert list(map(described, left.offences)) == [("gradient", 1, 0, 1, [2])]


def test_the_warm_start_skips_as_well(workers: WorkerPool) -> None:
    cases = [
        Case(tree(), FIRST, [minibatch], supervised=True) for minibatch in (GOOD, spoilt("weight"))
    ]
    ((good, bad),) = workers.run(1, updates, model=SMALL, parallel=ParallelConfig(), cases=cases)
    assert (good.metrics["optimizer/skipped"], good.unchanged) == (0, False)
    assert (bad.metrics["optimizer/skipped"], bad.unchanged) == (1, True)
    assert list(map(described, bad.offences)) == [("loss", 0, 0, 3, [2])]


# --------------------------------------------------------------------------- dumps


def test_what_is_dumped_is_not_finite_again(workers: WorkerPool) -> None:
    parallel, settings = ParallelConfig(), tree(importance="on")
    cases = [Case(settings, FIRST, [spoilt(what)]) for what in SPOILT]
    (found,) = workers.run(1, updates, model=SMALL, parallel=parallel, cases=cases)
    blamed = [left.offences[0] for left in found]
    assert [offence.what for offence in blamed] == [
        *("loss", "gradient", "projection", "loss", "loss"),
    ]
    good = replace(blamed[0], microbatches=((GOOD[0], GOOD[1]), (), (GOOD[2],)))
    (dumps,) = workers.run(
        1, replayed, model=SMALL, offences=[*blamed, good], projection=ProjectionConfig(bound=None)
    )
    assert [counts for counts, _ in dumps] == [[2], [2], [2] * 4, [2], [2], [2, 1]]
    assert [finite for _, finite in dumps] == [False] * 5 + [True]


def test_a_dump_shows_what_is_not_finite(workers: WorkerPool, tmp_path: Path) -> None:
    (ratio,) = workers.run(
        1,
        updates,
        model=SMALL,
        parallel=ParallelConfig(),
        cases=[Case(tree(importance="on"), FIRST, [spoilt("ratio")])],
    )[0]
    (offence,) = ratio.offences
    path = RunDir(tmp_path).nonfinite(12, offence.minibatch, offence.replica, offence.microbatch)
    dump(offence, path)
    assert path.name == "step_000012_minibatch_0_replica_0_microbatch_3.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    # The ratio of the last token is exp(10,000 + log pi).
    assert rows[0]["token_weights"].count("nan") == 1
    assert rows[0]["token_weights"][-1] == "nan"
    assert rows[0]["old_logprobs"][-1] == -1e4
    assert "nan" not in rows[1]["token_weights"]
    ((first, second),) = read_batch(path, VOCAB)
    assert first.token_weights is not None
    assert math.isnan(first.token_weights[-1])
    # N is that of the file: its gradient is the run's, which divides by N of the minibatch.
    tokens = loss_tokens([first, second])
    scale = tokens / loss_tokens(OTHER)
    assert second.token_weights == pytest.approx([w * scale for w in OTHER[7].token_weights or ()])
    assert (second.tokens, second.advantage) == (OTHER[7].tokens, OTHER[7].advantage)


# --------------------------------------------------------------------------- a run


@pytest.mark.parametrize(
    "choices",
    [
        ["parallel.tensor=2"],
        [
            "algorithm=ppo",
            "loss={mismatch: sequence, kl: {coefficient: 1, reference: rollout, target: 0.001}}",
        ],
    ],
    ids=["proma", "ppo"],
)
def test_a_run_with_a_broken_policy_goes_on(
    workers: WorkerPool, tmp_path: Path, choices: list[str]
) -> None:
    """Its weights are infinite and its logits NaN: it samples, scores and measures all the same."""
    root = {"name": "run", "root": str(tmp_path)}
    choices = [*TINY_RUN, *choices, "model.init_std=1e39", "trainer.steps=2"]
    config = validate_config(apply_overrides(root, choices), training=True)
    rows = rl_rows(run_in_pool(workers, config))
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        assert row["optimizer/skipped"] == 2
        for key in ("policy/entropy", "policy/kl_step", "loss/policy", "optimizer/grad_norm"):
            assert row[key] is None, key
        assert 0 <= row["reward/mean"] < 6
        assert row.get("loss/kl_coefficient", 1) == 1


def test_a_skipped_step_moves_no_coefficient() -> None:
    loss = {"kl": {"coefficient": 1, "reference": "rollout", "target": 0.1}}
    config = learning(SMALL, ParallelConfig(), {"algorithm": "ppo", "loss": loss})
    references = ReferencePolicies(config, cast(Learner, None))
    still = {"policy/kl_step": 0.0}
    references.adapt({**still, "optimizer/skipped": 1.0})
    assert references.coefficient == 1
    references.adapt({**still, "optimizer/skipped": 0.0})
    assert references.coefficient == 0.5
