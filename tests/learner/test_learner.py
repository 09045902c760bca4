"""The gradient of a minibatch is the loss's own, whatever layout, replicas and microbatches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.gradients import TINY, random_batch
from support.learning import Tensors, looks, minibatch_gradients, running_mean
from support.pool import WorkerPool

from proma_megatron.config.model import ParallelConfig
from proma_megatron.types import TrainingSequence

KL = {"coefficient": 0.3, "estimator": "k3"}
LOSSES: dict[str, dict[str, Any]] = {
    "reinforce": {"algorithm": "reinforce", "loss": {"importance": "on"}},
    "ppo": {"algorithm": "ppo", "loss": {"dual_clip": 1.2, "kl": {**KL, "reference": "rollout"}}},
    "grpo": {"algorithm": "grpo", "loss": {"kl": KL, "aggregation": "sequence_mean"}},
    "dr_grpo": {"algorithm": "dr_grpo", "loss": {"clip_high": 0.05}},
    "cispo": {"algorithm": "cispo", "loss": {"clip_low": 0.1}},
    "gspo": {"algorithm": "gspo", "loss": {"clip_low": 0.05, "clip_high": 0.05}},
    "entropy": {"algorithm": "reinforce", "loss": {"entropy": 0.7, "aggregation": "sequence_sum"}},
}
LAYOUTS = {
    "DP2": ParallelConfig(data=2),
    "TP2": ParallelConfig(tensor=2),
    "TP2 SP PP2": ParallelConfig(tensor=2, sequence=True, pipeline=2),
}
# One microbatch, many by a token budget, and some of three sequences each.
SPLITS: list[dict[str, Any]] = [
    {"tokens_per_microbatch": 400},
    {"tokens_per_microbatch": 26},
    {"sequences_per_microbatch": 3},
]


def batch() -> list[TrainingSequence]:
    """Sequences near the policy, some off it, with reference log-probabilities."""
    generator = torch.Generator().manual_seed(3)

    def near(mask: tuple[int, ...]) -> tuple[float, ...]:
        noise = torch.randn(len(mask), generator=generator, dtype=torch.float64)
        return tuple(float(-5.5 + 0.8 * x) * m for x, m in zip(noise, mask, strict=True))

    (found,) = random_batch(5, [10], shortest=5)
    return [
        replace(
            s,
            token_weights=None,
            advantage=0.0 if at == 4 else s.advantage,
            old_logprobs=near(s.loss_mask),
            reference_logprobs=near(s.loss_mask),
        )
        for at, s in enumerate(found)
    ]


def largest_error(found: Tensors, expected: Tensors) -> float:
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - value).norm() / value.norm()) for name, value in expected.items()
    )


@pytest.fixture(scope="module")
def whole(workers: WorkerPool) -> dict[str, Tensors]:
    """Each loss's gradient from one process and one microbatch."""
    trees = [{**tree, "batching": SPLITS[0]} for tree in LOSSES.values()]
    (found,) = workers.run(
        1,
        minibatch_gradients,
        model=TINY,
        parallel=ParallelConfig(),
        trees=trees,
        sequences=batch(),
    )
    return {name: gradient for name, (gradient, _) in zip(LOSSES, found, strict=True)}


def test_losses_differ(whole: dict[str, Tensors]) -> None:
    names = list(whole)
    for at, name in enumerate(names):
        for other in names[:at]:
            assert largest_error(whole[name], whole[other]) > 1e-3, (name, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_and_no_split_changes_a_loss(
    workers: WorkerPool, whole: dict[str, Tensors], layout: str
) -> None:
    parallel = LAYOUTS[layout]
    splits, names = SPLITS[1:] if parallel.data else SPLITS[2:], list(LOSSES)
    if parallel.pipeline > 1:  # what differs between losses is on the last stage
        names = ["grpo", "gspo", "entropy"]
    cases = [(name, split) for name in names for split in splits]
    found = workers.run(
        parallel.world_size,
        minibatch_gradients,
        model=TINY,
        parallel=parallel,
        trees=[{**LOSSES[name], "batching": split} for name, split in cases],
        sequences=batch(),
    )[0]
    for (name, split), (gradient, _) in zip(cases, found, strict=True):
        assert largest_error(gradient, whole[name]) < 1e-10, (name, split)


@pytest.mark.parametrize("kind", ["reinforce", "cispo", "ppo", "gspo"])
def test_what_the_accumulator_makes_of_unit_losses_is_the_plain_gradient(
    workers: WorkerPool, kind: str
) -> None:
    """In one microbatch nothing has been accumulated that could be projected."""
    loss = {"kind": kind, "importance": "on", "clip": kind == "cispo", "clip_low": 0.1}
    batching = {"batching": SPLITS[0]}
    projected, plain = workers.run(
        1,
        minibatch_gradients,
        model=TINY,
        parallel=ParallelConfig(),
        trees=[
            {"algorithm": "proma", "loss": loss, **batching},
            {"algorithm": kind, "loss": {**loss, "kind": None}, **batching},
        ],
        sequences=batch(),
    )[0]
    assert largest_error(projected[0], plain[0]) < 1e-12


def test_dropping_zero_advantages_changes_the_span_and_nothing_else(workers: WorkerPool) -> None:
    def gradients(algorithm: str) -> list[Tensors]:
        trees = [
            {
                "algorithm": algorithm,
                "batching": {"sequences_per_microbatch": 5, "zero_advantage": choice},
                "projection": {"bound": None},
            }
            for choice in ("keep", "drop")
        ]
        # The last five sequences: one without advantage among four that have one.
        sequences = [*batch()[5:], *batch()[:5]]
        arguments = {"model": TINY, "parallel": ParallelConfig(), "sequences": sequences}
        return [g for g, _ in workers.run(1, minibatch_gradients, trees=trees, **arguments)[0]]

    kept, dropped = gradients("reinforce")
    assert largest_error(dropped, kept) < 1e-12
    kept, dropped = gradients("proma")
    assert largest_error(dropped, kept) > 1e-6


@pytest.mark.parametrize("split", [{"tokens_per_microbatch": 64}, {"sequences_per_microbatch": 3}])
def test_sequences_without_loss_tokens_cost_nothing_and_change_nothing(
    workers: WorkerPool, split: dict[str, int]
) -> None:
    silent = [replace(s, loss_mask=(0,) * len(s.tokens)) for s in batch()[:3]]
    loud = batch()[3:9]
    # Threes of sequences stay threes, the last of them empty.
    (with_silent, sums), (without, _) = (
        workers.run(
            1,
            minibatch_gradients,
            model=TINY,
            parallel=ParallelConfig(),
            trees=[{"algorithm": "proma", "batching": split}],
            sequences=sequences,
        )[0][0]
        for sequences in ([*loud, *silent], loud)
    )
    assert sums.tokens == sum(s.loss_tokens for s in loud)
    assert all(torch.equal(with_silent[name], value) for name, value in without.items())


@pytest.mark.parametrize("layout", [None, "DP2"])
@pytest.mark.parametrize("algorithm", ["reinforce", "proma"])
def test_a_minibatch_that_is_dropped_whole_has_no_gradient(
    workers: WorkerPool, layout: str | None, algorithm: str
) -> None:
    parallel = LAYOUTS[layout] if layout else ParallelConfig()
    trees = [
        {"algorithm": algorithm, "batching": {**split, "zero_advantage": "drop"}}
        for split in SPLITS[1:]
    ]
    found = workers.run(
        parallel.world_size,
        minibatch_gradients,
        model=TINY,
        parallel=parallel,
        trees=trees,
        sequences=[replace(s, advantage=0.0) for s in batch()],
    )[0]
    for gradient, sums in found:
        assert sums.tokens == 0
        assert all(not value.any() for value in gradient.values())


@pytest.mark.parametrize("layout", [None, "DP2", "TP2 SP PP2"])
def test_references_and_divergences_are_those_of_the_whole_policy(
    workers: WorkerPool, layout: str | None
) -> None:
    parallel = LAYOUTS[layout] if layout else ParallelConfig()
    found = workers.run(
        parallel.world_size, looks, model=TINY, parallel=parallel, sequences=batch(), shift=0.02
    )[0]
    sequences = batch()
    before, after = found["before"], found["after"]
    assert [len(values) for values in before] == [len(s.tokens) for s in sequences]
    pairs = [
        (b, a)
        for s, old, new in zip(sequences, before, after, strict=True)
        for b, a, counts in zip(old, new, s.loss_mask, strict=True)
        if counts
    ]
    delta = torch.tensor([a - b for b, a in pairs], dtype=torch.float64)
    k3 = float((delta.expm1() - delta).mean())
    assert found["own"] == pytest.approx(0, abs=1e-13)
    assert found["moved"]["policy/kl_step"] == pytest.approx(k3, rel=1e-9)
    assert k3 > 1e-4
    assert found["moved"]["policy/kl_initial"] == pytest.approx(0, abs=1e-13)
    forward, reused = found["initial"]
    assert forward > 1e-4
    assert reused == forward
    # Before step 2 the mean of earlier policies is still the initial one.
    assert found["lagged"] == pytest.approx([0, 0], abs=1e-13)
    for s, old, new, attached in zip(sequences, before, after, found["batch"], strict=True):
        assert attached.old_logprobs == pytest.approx(new, abs=1e-12)
        assert attached.reference_logprobs == pytest.approx(old, abs=1e-12)
        for weight, own, sampled, counts in zip(
            attached.token_weights, new, s.old_logprobs, s.loss_mask, strict=True
        ):
            if counts:
                ratio = torch.tensor(own - sampled, dtype=torch.float64).exp()
                assert weight == pytest.approx(min(float(ratio), 2.0), rel=1e-12)
    assert all(inside and not still for _, inside, still in found["swap"])


def test_the_running_mean_is_of_the_last_weights(workers: WorkerPool) -> None:
    shifts = [0.5, 0.25, -1.0, 2.0, 0.125]
    ((errors, counts),) = workers.run(1, running_mean, model=TINY, shifts=shifts, steps=3)
    assert max(errors) < 1e-12
    assert counts == [1, 2, 3, 3, 3]
