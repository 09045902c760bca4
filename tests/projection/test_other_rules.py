"""ISOPO and Intra-PROMA: equal to the formulas on Hugging Face's model, and in every layout.

The chain of evidence is that of test_exactness.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.cases import (
    BATCHES,
    EXACT,
    GRID,
    MODELS,
    OTHER_RULES,
    PLAIN,
    PP2,
    SEED,
    SP2,
    SP4,
    TOLERANCE,
    VPP,
    Case,
    assert_equal,
    check_layout,
    iterating,
    run,
)
from support.gradients import captured_gradients, gradients, unit_figures
from support.pool import WorkerPool
from support.reference import reference_gradients

from proma_megatron.config.model import ParallelConfig
from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.projection import diagnostics

# Few by default; the slow suite has the product.
REFERENCE_CASES = [
    Case("kernel", "qwen3", "plain"),
    Case("norm", "qwen2", "advantage-0"),
    Case("subspace", "untied", "plain"),
    Case("subspace-bound", "qwen2", "plain"),
]
LAYOUT_CASES = [
    Case("kernel", **SP2, batch="many"),
    Case("norm", "kv1-bias", **SP4),
    Case("kernel", **VPP, batch="five"),
    Case("norm", data=2, block_bytes=4000),
    Case("subspace", "qwen2-untied", tensor=2),
    Case("subspace-bound", "kv1-bias", **SP4, batch="eights"),
    Case("subspace", **PP2),
    Case("subspace-output", **GRID, sequence=True),
    Case("subspace-input", "qwen2", tensor=2, recompute=True),
    Case("subspace-fused", "kv1", tensor=2, block_bytes=4000),
    Case("subspace-bound", data=2, batch="single"),
    Case("subspace", **SP2, dtype="float32", batch="empty"),
]
SLOW_REFERENCE_CASES = [
    Case(rule, model, batch)
    for rule, model in itertools.product(OTHER_RULES, ["qwen3", "untied", "qwen2-untied"])
    for batch in ("plain", "eights")
]
SLOW_LAYOUTS: list[dict[str, Any]] = [
    {"tensor": 2},
    SP2,
    {"tensor": 4},
    SP4,
    PP2,
    VPP,
    GRID | {"sequence": True},
    {"data": 2},
]
SLOW_LAYOUT_CASES = [
    Case(rule, model, batch, **layout)
    for rule, model, layout in itertools.product(
        OTHER_RULES, ["qwen3", "untied", "qwen2", "kv1-bias"], SLOW_LAYOUTS
    )
    for batch in ("plain", "many")
]


def check_reference(workers: WorkerPool, case: Case) -> None:
    expected = reference_gradients(
        MODELS[case.model], BATCHES[case.batch], OTHER_RULES[case.projection], SEED
    )
    assert_equal(
        run(workers, case),
        expected,
        TOLERANCE,
        comparison="one process against Hugging Face's model, float64",
        case=case,
    )


@pytest.mark.parametrize("case", REFERENCE_CASES, ids=str)
def test_one_process_equals_the_reference(workers: WorkerPool, case: Case) -> None:
    check_reference(workers, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_REFERENCE_CASES, ids=str)
def test_every_rule_and_model_equals_the_reference(workers: WorkerPool, case: Case) -> None:
    check_reference(workers, case)


@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_every_layout_equals_one_process(workers: WorkerPool, case: Case) -> None:
    check_layout(workers, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_LAYOUT_CASES, ids=str)
def test_the_product_of_layouts_equals_one_process(workers: WorkerPool, case: Case) -> None:
    check_layout(workers, case)


def test_an_iteration_finds_the_same_in_every_layout(
    workers: WorkerPool,
) -> None:
    """Which long microbatches take; here it is made to take short ones."""

    def found(parallel: ParallelConfig) -> dict[str, torch.Tensor]:
        return workers.run(
            parallel.world_size,
            iterating,
            model=MODELS["kv1-bias"],
            parallel=parallel,
            projection=OTHER_RULES["subspace"],
            batch=BATCHES["eights"],
            seed=SEED,
        )[0]

    assert_equal(found(ParallelConfig(tensor=2, sequence=True)), found(ParallelConfig()), TOLERANCE)


def test_padding_does_not_matter(workers: WorkerPool) -> None:
    arguments: dict[str, Any] = {
        "model": MODELS["untied"],
        "parallel": ParallelConfig(),
        "projection": OTHER_RULES["subspace"],
        "batch": BATCHES["plain"],
    }
    padded = workers.run(1, captured_gradients, padding=64, **arguments)[0]
    assert_equal(padded, workers.run(1, captured_gradients, **arguments)[0], TOLERANCE)


def test_replicas_change_nothing(workers: WorkerPool) -> None:
    """A microbatch stands for itself, so one chain of all of them is the same."""
    found = run(workers, Case("subspace", data=2))
    assert_equal(found, run(workers, Case("subspace")), TOLERANCE)


@pytest.mark.parametrize("rule", ["kernel", "subspace"])
def test_the_rule_changes_what_it_acts_on(workers: WorkerPool, rule: str) -> None:
    """Else equality with the reference would say little."""
    arguments: dict[str, Any] = {
        "model": MODELS["qwen2-untied"],
        "parallel": ParallelConfig(),
        "batch": BATCHES["plain"],
    }
    changed = workers.run(1, gradients, projection=OTHER_RULES[rule], **arguments)[0]
    plain = workers.run(1, gradients, projection=PLAIN, **arguments)[0]
    for name, value in plain.items():
        left_alone = rule == "subspace" and not name.endswith(("proj.weight", "lm_head.weight"))
        difference = float((changed[name] - value).norm() / value.norm())
        assert (difference < 1e-13) if left_alone else (difference > 1e-3), (name, difference)


# --------------------------------------------------------------------------- what is reported


@pytest.mark.parametrize("rule", ["kernel", "subspace-bound"])
def test_energies_are_those_of_the_change(workers: WorkerPool, rule: str) -> None:
    """Of one microbatch, the first included: plain gradient G, and what the rule made of it."""
    parallel = ParallelConfig(tensor=2, sequence=True)
    batch = [BATCHES["eights"][0]]

    def of(job: Any, projection: ProjectionConfig, **more: Any) -> dict[str, Any]:
        model = MODELS["qwen2-untied"]
        return workers.run(
            2, job, model=model, parallel=parallel, projection=projection, batch=batch, **more
        )[0]

    plain = of(captured_gradients, EXACT)  # nothing to project from yet
    changed = of(captured_gradients, OTHER_RULES[rule])
    found = of(unit_figures, OTHER_RULES[rule], raw=True)
    linear = [n for n in plain if n.endswith(("proj.weight", "lm_head.weight"))]
    assert sorted(found) == sorted(linear if rule.startswith("subspace") else plain)
    for name, sums in found.items():
        removed = (plain[name] - changed[name]).square().sum()
        assert sums.removed == pytest.approx(float(removed), rel=1e-9), name
        assert sums.accumulated == pytest.approx(float(plain[name].square().sum()), rel=1e-9)
        assert sums.solved == 1
        assert sums.residual == 0
        limit = 0.999999 * 0.25 * sums.accumulated
        # Shrunk to a half, what was clamped to a half of |G| is a quarter.
        assert bool(sums.clamped) == (rule == "subspace-bound" and removed >= 0.25 * limit)
    assert bool(sum(sums.clamped for sums in found.values())) == (rule == "subspace-bound")
    metrics = diagnostics.metrics(found)
    assert 0 < metrics["projection/removed_energy"] < 1
    known = {"effective_rank", "cosine", "orthogonality_residual"}
    reported = {key.removeprefix("projection/") for key in metrics}
    assert known & reported == (set() if rule == "subspace-bound" else known)


@pytest.mark.parametrize("rule", ["kernel", "subspace-bound"])
def test_every_layout_reports_the_same(workers: WorkerPool, rule: str) -> None:
    def figures(parallel: ParallelConfig) -> dict[str, dict[str, float]]:
        return workers.run(
            parallel.world_size,
            unit_figures,
            model=MODELS["kv1-bias"],
            parallel=parallel,
            projection=OTHER_RULES[rule],
            batch=BATCHES["plain"],
        )[0]

    alone = figures(ParallelConfig())
    found = figures(ParallelConfig(tensor=2, pipeline=2, sequence=True))
    assert found.keys() == alone.keys()
    for name, expected in alone.items():
        assert found[name] == pytest.approx(expected, rel=1e-8, abs=1e-12), name
