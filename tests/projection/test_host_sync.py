"""Nothing in a projected backward pass makes the host wait for a GPU.

There is none here: what is done instead where `waiting.asynchronous` says so runs on the CPU, which
gives the gradients that it gives anyway, and every operation of it is looked at.
"""

from __future__ import annotations

import pytest
from support.cases import (
    BATCHES,
    EXACT,
    MODELS,
    SEED,
    SP2,
    TOLERANCE,
    Case,
    assert_equal,
    projection_named,
    unsharded,
)
from support.gradients import streaming
from support.pool import WorkerPool
from support.waiting import products_beside_sums, watched

CASES = [
    Case("exact", "qwen3", batch="twice", **SP2),
    Case("exact-bound", "untied", batch="many", block_bytes=4000),
    Case("exact-linear", "qwen2-untied", batch="no-loss-token", tensor=2),
    Case("iterative-fused", "untied", tensor=2),
    Case("ridge-bound", "qwen2", batch="empty"),
    Case("norm-fused", "qwen3", batch="advantage-0", **SP2),
    Case("kernel", "untied", batch="twice"),
    Case("subspace-bound", "untied", tensor=2),
]
# Of Intra-PROMA's rule alone: one a layer, as `deflating` says.
LEFT = {"subspace": {"_linalg_eigh"}}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_operation_of_a_backward_pass_waits(workers: WorkerPool, case: Case) -> None:
    projection = projection_named(case.projection)
    if case.block_bytes is not None:
        projection = streaming(projection, case.block_bytes)
    ranks = workers.run(
        case.world_size,
        watched,
        model=MODELS[case.model],
        parallel=case.parallel,
        projection=projection,
        batch=BATCHES[case.batch],
        seed=SEED,
    )
    for found in ranks:
        assert {"index_add_", "mm"} <= found["operations"]  # it has looked into the accumulator
        assert found["waiting"] == LEFT.get(projection.rule, set())
    expected = unsharded(workers, case.model, case.projection, case.batch, case.dtype, 0, 1)
    assert_equal(ranks[0]["gradients"], expected, TOLERANCE, comparison="asynchronous", case=case)


@pytest.mark.parametrize("model", ["qwen3", "untied"])
def test_a_layers_sum_runs_beside_the_next_layers_backward(workers: WorkerPool, model: str) -> None:
    """That of the first layer waits for the embedding, which saves a collective."""
    found = workers.run(
        2,
        products_beside_sums,
        model=MODELS[model],
        parallel=Case(**SP2).parallel,
        projection=EXACT,
        batch=BATCHES["two"],
    )
    for counts in found:
        *before, last = counts  # of the one microbatch that is projected
        assert len(before) == MODELS[model].layers - 1
        assert min(before) >= 1
        assert last == 0
