"""What holds for the projected accumulation of a sharded model, whatever the batch.

Each property compares two runs of the real thing: Megatron's schedule, layers and accumulator.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cases import EXACT, TOLERANCE, assert_equal
from support.gradients import (
    TINY,
    VOCAB,
    Batch,
    captured_gradients,
    collectives,
    gradients,
    gradients_after_a_broken_step,
    gradients_without_waiting,
    plain_gradients,
    random_batch,
    streaming,
)
from support.pool import WorkerPool

from proma_megatron.config.model import ModelConfig, ParallelConfig
from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.learner.gradients import denominator
from proma_megatron.types import TrainingSequence

MODEL = TINY.model_copy(update={"layers": 2, "qkv_bias": True})
SHARDED = ParallelConfig(tensor=2, sequence=True)
BOUNDED = ProjectionConfig(bound=0.5)

# A run is a few tenths of a second on two processes; the pool is the same for all examples.
few = settings(
    deadline=None,
    max_examples=3,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
seeds = st.integers(0, 2**32 - 1)
counts = st.lists(st.integers(1, 5), min_size=2, max_size=4)


def run(
    workers: WorkerPool,
    batch: Batch,
    projection: ProjectionConfig = EXACT,
    job: Any = gradients,
    model: ModelConfig = MODEL,
    **arguments: Any,
) -> dict[str, torch.Tensor]:
    return workers.run(
        2, job, model=model, parallel=SHARDED, projection=projection, batch=batch, **arguments
    )[0]


def muted(microbatch: list[TrainingSequence]) -> list[TrainingSequence]:
    """The same sequences with advantage 0: a span, and nothing to add."""
    return [dataclasses.replace(sequence, advantage=0.0) for sequence in microbatch]


@few
@given(seed=seeds, ks=counts, data=st.data())
def test_the_order_of_sequences_in_a_microbatch_does_not_matter(
    workers: WorkerPool, seed: int, ks: list[int], data: st.DataObject
) -> None:
    batch = random_batch(seed, ks)
    shuffled = [data.draw(st.permutations(microbatch)) for microbatch in batch]
    assert_equal(run(workers, shuffled, BOUNDED), run(workers, batch, BOUNDED), TOLERANCE)


@few
@given(seed=seeds, ks=counts, padding=st.sampled_from([2, 6, 16, 64]))
def test_padding_does_not_matter(
    workers: WorkerPool, seed: int, ks: list[int], padding: int
) -> None:
    batch = random_batch(seed, ks)
    found = run(workers, batch, BOUNDED, captured_gradients, padding=padding)
    assert_equal(found, run(workers, batch, BOUNDED), TOLERANCE)


@few
@given(seed=seeds, ks=counts, data=st.data())
def test_silent_sequences_between_the_others_do_not_matter(
    workers: WorkerPool, seed: int, ks: list[int], data: st.DataObject
) -> None:
    """They move every other sequence to another place of the packed microbatch."""
    batch = random_batch(seed, ks)
    widened = []
    for microbatch in batch:
        changed = list(microbatch)
        for _ in range(data.draw(st.integers(0, 3))):
            length = data.draw(st.integers(1, 9))
            silent = TrainingSequence(
                tokens=tuple(data.draw(st.integers(0, VOCAB - 1)) for _ in range(length)),
                loss_mask=(0,) * length,
                advantage=data.draw(st.sampled_from([0.0, 3.0])),
                old_logprobs=(0.0,) * length,
            )
            changed.insert(data.draw(st.integers(0, len(changed))), silent)
        widened.append(changed)
    assert_equal(run(workers, widened, BOUNDED), run(workers, batch, BOUNDED), TOLERANCE)


@few
@given(seed=seeds, ks=counts, factor=st.sampled_from([-4.0, 1e-3, 0.37, 1e3]), data=st.data())
def test_scaling_a_sequences_loss_does_not_change_the_span(
    workers: WorkerPool, seed: int, ks: list[int], factor: float, data: st.DataObject
) -> None:
    """With the advantage scaled back, nothing changes at all."""
    batch = random_batch(seed, ks)
    m = data.draw(st.integers(0, len(batch) - 1))
    s = data.draw(st.integers(0, len(batch[m]) - 1))
    sequence = batch[m][s]
    assert sequence.token_weights is not None
    scaled = [list(microbatch) for microbatch in batch]
    scaled[m][s] = dataclasses.replace(
        sequence,
        token_weights=tuple(weight * factor for weight in sequence.token_weights),
        advantage=sequence.advantage / factor,
    )
    assert_equal(run(workers, scaled, BOUNDED), run(workers, batch, BOUNDED), TOLERANCE)


@few
@given(seed=seeds, ks=counts)
def test_projecting_twice_is_projecting_once(workers: WorkerPool, seed: int, ks: list[int]) -> None:
    *before, last = random_batch(seed, ks)
    once, total = [*before, muted(last)], denominator([*before, last])
    twice = [*once, muted(last)]
    assert_equal(run(workers, twice, total=total), run(workers, once, total=total), TOLERANCE)


@few
@given(seed=seeds, ks=counts)
def test_right_after_projecting_nothing_is_left_along_any_sequence(
    workers: WorkerPool, seed: int, ks: list[int]
) -> None:
    """|<A, u_s>| / |A| with A and u_s as vectors; muted sequences leave A as it was projected."""
    *before, last = random_batch(seed, ks)
    total = denominator([*before, last])
    whole = run(workers, before, total=total)
    projected = run(workers, [*before, muted(last)], total=total)
    for sequence in last:
        alone = [[dataclasses.replace(sequence, advantage=1.0)]]
        direction = run(workers, alone, ProjectionConfig(rule="none"), total=total)
        for name, gradient in direction.items():
            overlap = float((projected[name] * gradient).sum()) / float(gradient.norm())
            assert abs(overlap) <= TOLERANCE * float(whole[name].norm()), name


@few
@given(seed=seeds, ks=counts)
@pytest.mark.parametrize(
    "inactive",
    [
        pytest.param({"rule": "none"}, id="rule none"),
        # Also in test_exactness.py, on two ranks.
        pytest.param({"shrinkage": 0.0}, id="shrinkage 0", marks=pytest.mark.slow),
        pytest.param({"bound": 0.0}, id="bound 0", marks=pytest.mark.slow),
    ],
)
def test_what_removes_nothing_is_plain_accumulation_bit_for_bit(
    workers: WorkerPool, inactive: dict[str, Any], seed: int, ks: list[int]
) -> None:
    batch = random_batch(seed, ks)
    model = MODEL.model_copy(update={"dtype": "float32"})
    found = run(workers, batch, ProjectionConfig(**inactive), model=model)
    plain = run(workers, batch, job=plain_gradients, model=model)
    assert found.keys() == plain.keys()
    assert [name for name in plain if not torch.equal(found[name], plain[name])] == []


def test_a_step_that_broke_off_leaves_nothing_to_the_next(workers: WorkerPool) -> None:
    batch = random_batch(3, [3, 3, 3])
    found = run(workers, batch, job=gradients_after_a_broken_step)
    fresh = run(workers, batch, job=captured_gradients)
    assert [name for name in fresh if not torch.equal(found[name], fresh[name])] == []


@pytest.mark.parametrize("kept", [6_000, 30_000, 60_000])
def test_what_the_workspace_has_room_for_changes_no_gradient(
    workers: WorkerPool, kept: int
) -> None:
    """Kept and streamed weights in one group, and groups that can't wait for each other."""
    batch = random_batch(4, [2, 3, 1, 2])
    found = run(workers, batch, streaming(EXACT, kept))
    assert_equal(found, run(workers, batch), TOLERANCE)


@pytest.mark.parametrize(
    "parallel",
    [
        SHARDED,
        ParallelConfig(tensor=2),
        ParallelConfig(pipeline=2, virtual_pipeline=2),
    ],
    ids=["SP2", "TP2", "VPP2"],
)
def test_short_vectors_may_wait_for_the_end_of_a_microbatch(
    workers: WorkerPool, parallel: ParallelConfig
) -> None:
    batch = random_batch(6, [3, 1, 2, 3])
    model = TINY.model_copy(update={"qkv_bias": True})
    job = {"model": model, "parallel": parallel, "projection": EXACT, "batch": batch}
    found, waited = (
        workers.run(2, run, **job)[0] for run in (gradients_without_waiting, gradients)
    )
    assert_equal(found, waited, TOLERANCE)


def test_an_empty_first_microbatch_is_not_the_first(workers: WorkerPool) -> None:
    batch = random_batch(5, [2, 3])
    silent = [dataclasses.replace(s, loss_mask=(0,) * len(s.tokens)) for s in batch[0]]
    assert_equal(run(workers, [silent, *batch]), run(workers, batch), TOLERANCE)
    sizes = run(workers, [silent, *batch], job=collectives)["sizes"]
    assert len(sizes) == MODEL.layers


def test_one_collective_serves_a_transformer_layer_and_microbatch(workers: WorkerPool) -> None:
    """Final norm and head go with the last layer, the embedding with the first."""
    batch = random_batch(0, [2, 3, 1, 4])
    sizes = run(workers, batch, job=collectives)["sizes"]
    projecting = len(batch) - 1  # nothing is removed on the first microbatch
    assert len(sizes) == MODEL.layers * projecting
