"""Projected gradients: equal to the paper's, and the same in every layout.

In float64 a term that is forgotten anywhere (a cross term, a reduction, a row) shows up many orders
of magnitude above the tolerance. The chain of evidence: one unsharded process equals
the reference (Hugging Face's model, vectors of dimension d); every layout equals that process.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from support import faults
from support.cases import (
    BATCHES,
    EVERY_PROJECTION,
    EXACT,
    GRID,
    MODELS,
    PLAIN,
    PP2,
    PROJECTIONS,
    SEED,
    SP2,
    SP4,
    TOLERANCE,
    VPP,
    Case,
    assert_equal,
    check_layout,
    run,
)
from support.gradients import TINY, captured_gradients, gradients
from support.pool import WorkerPool
from support.reference import reference_gradients
from support.slow import again

from proma_megatron.config.model import ParallelConfig
from proma_megatron.config.objective import ProjectionConfig

# --------------------------------------------------------------------------- one process


REFERENCE_CASES = [
    Case("exact", "qwen3", "plain"),
    Case("exact-bound", "qwen3", "many"),
    Case("exact-half", "untied", "plain"),
    Case("exact-linear", "qwen3", "plain"),
    Case("exact-linear", "untied", "five"),
    Case("exact-fused", "qwen2", "plain"),
    Case("iterative", "qwen3", "many"),
    Case("iterative-bound", "qwen2", "plain"),
    Case("iterative-fused", "untied", "plain"),
    Case("ridge", "untied", "five"),
    Case("ridge-bound", "qwen3", "eights"),
    Case("ridge-linear-fused", "qwen2-untied", "plain"),
    Case("exact-bound", "qwen2-untied", "advantage-0"),
    Case("exact", "kv1", "no-loss-token"),
    Case("exact", "kv4", "one-loss-token"),
    Case("exact", "qwen3", "twice"),
    Case("exact-bound", "untied", "all-equal"),
    Case("exact", "qwen3", "all-advantages-0"),
    Case("exact", "qwen3", "empty"),
    Case("exact-bound", "qwen3", "cancelling"),
    Case("exact", "qwen3", "single"),
    Case("exact", "untied", "plain", block_bytes=4000),
]


@pytest.mark.parametrize("case", REFERENCE_CASES, ids=str)
def test_one_process_equals_the_reference(workers: WorkerPool, case: Case) -> None:
    expected = reference_gradients(
        MODELS[case.model], BATCHES[case.batch], PROJECTIONS[case.projection], SEED
    )
    assert_equal(
        run(workers, case),
        expected,
        TOLERANCE,
        comparison="one process against Hugging Face's model, float64",
        case=case,
    )


@pytest.mark.parametrize("model", ["qwen3", "untied", "qwen2"])
def test_without_projection_gradients_are_hugging_faces(workers: WorkerPool, model: str) -> None:
    batch = BATCHES["plain"]
    found = workers.run(
        1,
        gradients,
        model=MODELS[model],
        parallel=ParallelConfig(),
        projection=PLAIN,
        batch=batch,
        seed=SEED,
    )[0]
    expected = reference_gradients(MODELS[model], batch, PLAIN, SEED)
    assert_equal(found, expected, TOLERANCE)


@pytest.mark.parametrize("change", [{"shrinkage": 0.0}, {"bound": 0.0}], ids=str)
@pytest.mark.parametrize("tensor", [1, 2])
def test_removing_nothing_is_megatrons_own_accumulation(
    workers: WorkerPool, tensor: int, change: dict[str, float]
) -> None:
    """The whole path of captured gradients against autograd's."""

    def accumulate(job: Any, projection: ProjectionConfig) -> dict[str, torch.Tensor]:
        return workers.run(
            tensor,
            job,
            model=TINY,
            parallel=ParallelConfig(tensor=tensor, sequence=tensor > 1),
            projection=projection,
            batch=BATCHES["plain"],
        )[0]

    found = accumulate(captured_gradients, EXACT.model_copy(update=change))
    assert_equal(found, accumulate(gradients, PLAIN), 1e-13)


def test_the_projection_changes_every_tensor(workers: WorkerPool) -> None:
    """Else equality with the reference would say little."""
    arguments: dict[str, Any] = {
        "model": TINY,
        "parallel": ParallelConfig(),
        "batch": BATCHES["plain"],
    }
    projected = workers.run(1, gradients, projection=EXACT, **arguments)[0]
    plain = workers.run(1, gradients, projection=PLAIN, **arguments)[0]
    for name, value in plain.items():
        assert (projected[name] - value).norm() > 1e-3 * value.norm(), name


# --------------------------------------------------------------------------- layouts


LAYOUT_CASES = [
    # tensor parallelism
    Case("exact-bound", tensor=2, batch="many"),
    Case("iterative", "qwen2", tensor=2),
    Case("ridge-bound", "kv4", tensor=2),
    Case("exact-linear", "untied", tensor=2),
    Case("exact-fused", "qwen2", tensor=2),
    Case("exact-bound", "kv1", tensor=4),
    Case("iterative-bound", "kv4", tensor=4),
    # sequence parallelism
    Case("exact-bound", "untied", **SP2),
    Case("iterative", "qwen2", **SP2),
    Case("ridge", **SP2, batch="no-loss-token"),
    Case("exact-fused", "qwen2-untied", **SP2),
    Case("exact-half", "kv4", **SP4, batch="all-equal"),
    Case("iterative-fused", "kv1-bias", **SP4),
    # pipeline
    Case("exact", **PP2),
    Case("exact-bound", "untied", **PP2, batch="many"),
    Case("iterative-bound", "qwen2", **PP2, batch="five"),
    Case("ridge", **PP2, batch="single"),
    Case("exact-bound", "untied", pipeline=4),
    Case("iterative", "qwen2", pipeline=4, batch="two"),
    # interleaved pipeline; "five" is filled up with an empty microbatch
    Case("exact", **VPP),
    Case("iterative", "untied", **VPP, batch="five"),
    Case("ridge", "qwen2", **VPP, batch="five"),
    Case("exact-bound", "deep", pipeline=4, virtual=2, batch="many"),
    Case("exact", tensor=2, **VPP, batch="five"),
    Case("exact-bound", **SP2, **VPP),
    # tensor x pipeline
    Case("exact-bound", "untied", **GRID, sequence=True),
    Case("iterative-bound", "qwen2", **GRID),
    Case("ridge-linear-fused", "kv1", **GRID),
    # replicas
    Case("exact", data=2),
    Case("iterative", "qwen2", data=2, **SP2),
    Case("exact-bound", data=2, **PP2, batch="many"),
    Case("exact", data=2, **VPP),
    Case("ridge", data=2, tensor=2, batch="no-loss-token"),
    # recomputation
    Case("exact", recompute=True),
    Case("exact-bound", "qwen2", **SP2, recompute=True),
    Case("exact", **VPP, recompute=True),
    # streaming, down to single rows
    Case("exact", block_bytes=4000),
    Case("exact-bound", "untied", block_bytes=0),
    Case("iterative-fused", "qwen2", **SP2, block_bytes=4000),
    Case("ridge", "kv1", **SP2, block_bytes=4000),
    # sequences out of the ordinary
    Case("exact", tensor=2, batch="advantage-0"),
    Case("exact-bound", **SP2, batch="all-advantages-0"),
    Case("exact", **PP2, batch="one-loss-token"),
    Case("exact-bound", **SP2, batch="twice"),
    Case("exact", **GRID, sequence=True, batch="empty"),
    Case("exact", tensor=2, batch="eights"),
    Case("iterative-bound", "qwen2", tensor=2, batch="cancelling"),
    Case("exact", data=2, batch="single"),  # a replica without a microbatch
    # float32: 1e-4
    Case("exact-bound", **SP2, dtype="float32", batch="many"),
    Case("iterative", "qwen2", **GRID, dtype="float32"),
    Case("ridge", "untied", **VPP, dtype="float32", batch="five"),
]
# Combinations of what the cases above have already.
REPEATED_LAYOUT_CASES = [
    Case("exact", tensor=2),
    Case("exact-half", "untied", tensor=2),
    Case("exact-fused", "kv1", tensor=4),
    Case("exact", "kv1-bias", tensor=4),
    Case("ridge", "qwen2-untied", tensor=4),
    Case("exact", batch="many", **SP2),
    Case("exact", **SP4),
    Case("exact-bound", "kv1", **SP4),
    Case("exact-linear", **PP2),
    Case("exact", pipeline=4, batch="many"),
    Case("exact-bound", **VPP, batch="many"),
    Case("exact", **GRID, batch="many"),
    Case("exact", **GRID, sequence=True, batch="five"),
    Case("exact-bound", "untied", data=2, batch="many"),
    Case("exact", **GRID, sequence=True, recompute=True),
    Case("exact", **GRID, block_bytes=10_000, batch="five"),
    Case("exact", **GRID, batch="no-loss-token"),
    Case("exact-linear", tensor=2, batch="twice"),
    Case("exact", **VPP, batch="all-equal"),
    Case("exact-bound", **SP2, batch="cancelling"),
    Case("exact", "kv1-bias", **SP4, dtype="float32", batch="eights"),
    Case("exact-fused", pipeline=4, dtype="float32", batch="twice"),
    Case("exact", data=2, tensor=2, dtype="float32", batch="no-loss-token"),
]


# The full product has too many cases even for the slow suite. All projections in all layouts, and
# all models with all batches in all layouts; what is left of the axes is drawn.
PRODUCT_LAYOUTS: list[dict[str, Any]] = [
    {"tensor": 2},
    SP2,
    {"tensor": 4},
    SP4,
    PP2,
    {"pipeline": 4},
    VPP,
    GRID,
    GRID | {"sequence": True},
    VPP | {"tensor": 2},
    VPP | SP2,
    {"data": 2},
    SP2 | {"data": 2},
    PP2 | {"data": 2},
    VPP | {"data": 2},
]
DRAW = random.Random(0)
PROJECTIONS_X_LAYOUTS = [
    Case(
        projection,
        DRAW.choice(list(MODELS)),
        DRAW.choice(list(BATCHES)),
        recompute=recompute,
        block_bytes=DRAW.choice([None, None, 4000]),
        **layout,
    )
    for projection in EVERY_PROJECTION
    for recompute, layout in itertools.product([False, True], PRODUCT_LAYOUTS)
]
MODELS_X_BATCHES_X_LAYOUTS = [
    Case(DRAW.choice(list(PROJECTIONS)), model, batch, recompute=DRAW.random() < 0.5, **layout)
    for model, batch in itertools.product(MODELS, BATCHES)
    for layout in PRODUCT_LAYOUTS
]


@pytest.mark.parametrize("case", [*LAYOUT_CASES, *again(*REPEATED_LAYOUT_CASES)], ids=str)
def test_every_layout_equals_one_process(workers: WorkerPool, case: Case) -> None:
    check_layout(workers, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*PROJECTIONS_X_LAYOUTS, *MODELS_X_BATCHES_X_LAYOUTS], ids=str)
def test_the_product_of_layouts_equals_one_process(workers: WorkerPool, case: Case) -> None:
    check_layout(workers, case)


def test_two_replicas_are_the_papers_two_chains(workers: WorkerPool) -> None:
    expected = reference_gradients(TINY, BATCHES["plain"], EXACT, SEED, replicas=2)
    assert_equal(run(workers, Case(data=2)), expected, TOLERANCE)


def test_the_same_run_gives_the_same_bits(workers: WorkerPool) -> None:
    case = Case("exact-bound", **GRID, sequence=True)
    first, second = run(workers, case), run(workers, case)
    assert all(torch.equal(first[name], second[name]) for name in first)


# --------------------------------------------------------------------------- refusals


def test_a_trainable_parameter_that_nobody_claims_is_refused(workers: WorkerPool) -> None:
    complaint = workers.run(1, faults.build_with_an_uncaptured_norm, frozen=False)[0]
    assert complaint.startswith("ValueError")
    assert "decoder.layers.1.input_layernorm.weight" in complaint


def test_a_frozen_parameter_needs_no_claim(workers: WorkerPool) -> None:
    assert workers.run(1, faults.build_with_an_uncaptured_norm, frozen=True)[0] == ""


@pytest.mark.parametrize(
    ("path", "parameter"),
    [
        ("mlp.linear_fc2", "decoder.layers.2.mlp.linear_fc2.weight"),
        ("self_attention.q_layernorm", "decoder.layers.2.self_attention.q_layernorm.weight"),
    ],
)
def test_a_layer_that_does_not_hand_over_is_noticed(
    workers: WorkerPool, path: str, parameter: str
) -> None:
    complaint = workers.run(1, faults.run_with_a_forgotten_layer, layer=2, path=path)[0]
    assert complaint.startswith("RuntimeError")
    assert f"{parameter} saw 0 of 2" in complaint
