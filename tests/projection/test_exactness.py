"""Projected gradients: equal to the paper's, and the same in every layout.

Everything is float64, so a term that is forgotten anywhere (a cross term, a reduction, a row) shows
up many orders of magnitude above the tolerance. The chain of evidence: one unsharded process equals
the reference (Hugging Face's model, vectors of dimension d); every layout equals that process.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import faults
from support.gradients import (
    TINY,
    Batch,
    captured_gradients,
    gradients,
    random_batch,
    streaming,
)
from support.pool import WorkerPool
from support.reference import reference_gradients

from proma_megatron.config import ModelConfig, ParallelConfig, ProjectionConfig
from proma_megatron.exactness.accumulate import denominator
from proma_megatron.records import TrainingSequence

SEED = 7
TOLERANCE = 1e-10
# A solve loses as many digits as K's condition number has. Eight sequences in the eight dimensions
# of a q/k norm are nearly dependent now and then.
NEARLY_DEPENDENT = 1e-7

MODELS: dict[str, ModelConfig] = {
    "qwen3": TINY,
    "untied": TINY.model_copy(update={"tie_embeddings": False}),
    "qwen2": TINY.model_copy(update={"qk_norm": False, "qkv_bias": True}),
    "qwen2-untied": TINY.model_copy(
        update={"qk_norm": False, "qkv_bias": True, "tie_embeddings": False}
    ),
    "kv1": TINY.model_copy(update={"kv_heads": 1}),
    "kv1-bias": TINY.model_copy(update={"kv_heads": 1, "qk_norm": False, "qkv_bias": True}),
    "kv4": TINY.model_copy(update={"kv_heads": 4}),
    "deep": TINY.model_copy(update={"layers": 8}),
}

EXACT = ProjectionConfig(bound=None)
PROJECTIONS: dict[str, ProjectionConfig] = {
    "exact": EXACT,
    "exact-bound": ProjectionConfig(bound=0.5),
    "exact-half": ProjectionConfig(bound=None, shrinkage=0.5),
    "exact-linear": ProjectionConfig(bound=None, parameters="linear"),
    "exact-fused": ProjectionConfig(bound=None, unit="megatron"),
    "iterative": ProjectionConfig(rule="iterative", bound=None),
    "iterative-bound": ProjectionConfig(rule="iterative", bound=0.5, shrinkage=0.5),
    "iterative-fused": ProjectionConfig(rule="iterative", bound=None, unit="megatron"),
    "ridge": ProjectionConfig(rule="ridge", bound=None),
    "ridge-bound": ProjectionConfig(rule="ridge", bound=0.5),
    "ridge-linear-fused": ProjectionConfig(
        rule="ridge", bound=None, parameters="linear", unit="megatron"
    ),
}
PLAIN = ProjectionConfig(rule="none")


def _with_loss_tokens(sequence: TrainingSequence, count: int) -> TrainingSequence:
    length = len(sequence.tokens)
    mask = (0,) * (length - count) + (1,) * count
    return dataclasses.replace(sequence, loss_mask=mask)


def _edited(batch: Batch, **changes: Any) -> Batch:
    """Every microbatch with its first sequence changed."""
    return [[dataclasses.replace(first, **changes), *rest] for first, *rest in batch]


def _batches() -> dict[str, Batch]:
    plain = random_batch(1, [2, 3, 1, 3])
    return {
        "plain": plain,
        "single": random_batch(2, [3]),
        "two": random_batch(3, [4, 2]),
        "many": random_batch(4, [1, 5, 8, 2, 3, 4, 7, 6]),
        "eights": random_batch(5, [8, 8, 8, 8]),
        "five": random_batch(6, [2, 1, 3, 2, 2]),
        "advantage-0": _edited(plain, advantage=0.0),
        "all-advantages-0": [
            plain[0],
            [dataclasses.replace(s, advantage=0.0) for s in plain[1]],
            *plain[2:],
        ],
        "one-loss-token": [[_with_loss_tokens(s, 1) for s in m] for m in plain],
        "no-loss-token": [[_with_loss_tokens(m[0], 0), *m[1:]] for m in plain],
        "twice": [[m[0], *m] for m in plain],
        "all-equal": [[plain[0][0]] * 3 for _ in range(4)],
        "empty": [plain[0], [], plain[1], plain[3]],
    }


BATCHES = _batches()


@dataclass(frozen=True)
class Case:
    """One run of the real thing, compared with one process that shards and recomputes nothing."""

    projection: str = "exact"
    model: str = "qwen3"
    batch: str = "plain"
    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual: int | None = None
    data: int = 1
    recompute: bool = False
    block_bytes: int | None = None  # None: materialized
    tolerance: float = TOLERANCE

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor=self.tensor,
            sequence=self.sequence,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual,
        )

    def __str__(self) -> str:
        layout = [
            f"tp{self.tensor}" if self.tensor > 1 else "",
            "sp" if self.sequence else "",
            f"pp{self.pipeline}" if self.pipeline > 1 else "",
            f"vpp{self.virtual}" if self.virtual else "",
            f"dp{self.data}" if self.data > 1 else "",
            "recompute" if self.recompute else "",
            f"stream{self.block_bytes}" if self.block_bytes is not None else "",
        ]
        return " ".join([*filter(None, layout), self.model, self.projection, self.batch])


def run(workers: WorkerPool, case: Case) -> dict[str, torch.Tensor]:
    model, projection = MODELS[case.model], PROJECTIONS[case.projection]
    if case.recompute:
        model = model.model_copy(update={"recompute": "full"})
    if case.block_bytes is not None:
        projection = streaming(projection, case.block_bytes)
    return workers.run(
        case.world_size,
        gradients,
        model=model,
        parallel=case.parallel,
        projection=projection,
        batch=BATCHES[case.batch],
        seed=SEED,
    )[0]


@functools.cache
def unsharded(
    workers: WorkerPool, model: str, projection: str, batch: str, replica: int, replicas: int
) -> dict[str, torch.Tensor]:
    """One process, over the chain of one replica."""
    return workers.run(
        1,
        gradients,
        model=MODELS[model],
        parallel=ParallelConfig(),
        projection=PROJECTIONS[projection],
        batch=BATCHES[batch][replica::replicas],
        seed=SEED,
        total=denominator(BATCHES[batch]),
    )[0]


def assert_equal(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    """Every tensor within ``tolerance`` of its norm; all that are not are listed."""
    assert found.keys() == expected.keys()
    wrong = {}
    for name, value in expected.items():
        error = float((found[name] - value).norm() / value.norm().clamp(min=1e-300))
        if not error <= tolerance:  # also for NaN
            wrong[name] = error
    assert not wrong


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
    Case("exact", "qwen3", "single"),
    Case("exact", "untied", "plain", block_bytes=4000),
]


@pytest.mark.parametrize("case", REFERENCE_CASES, ids=str)
def test_one_process_equals_the_reference(workers: WorkerPool, case: Case) -> None:
    expected = reference_gradients(
        MODELS[case.model], BATCHES[case.batch], PROJECTIONS[case.projection], SEED
    )
    assert_equal(run(workers, case), expected, case.tolerance)


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


SP2: dict[str, Any] = {"tensor": 2, "sequence": True}
SP4: dict[str, Any] = {"tensor": 4, "sequence": True}
PP2: dict[str, Any] = {"pipeline": 2}
VPP: dict[str, Any] = {"pipeline": 2, "virtual": 2}
GRID: dict[str, Any] = {"tensor": 2, "pipeline": 2}

LAYOUT_CASES = [
    # tensor parallelism
    Case("exact", tensor=2),
    Case("exact-bound", tensor=2, batch="many"),
    Case("exact-half", "untied", tensor=2),
    Case("iterative", "qwen2", tensor=2),
    Case("ridge-bound", "kv4", tensor=2),
    Case("exact-linear", "untied", tensor=2),
    Case("exact-fused", "qwen2", tensor=2),
    Case("exact", tensor=4),
    Case("exact-bound", "kv1", tensor=4),
    Case("iterative-bound", "kv4", tensor=4),
    Case("exact-fused", "kv1", tensor=4),
    Case("exact", "kv1-bias", tensor=4),
    Case("ridge", "qwen2-untied", tensor=4),
    # sequence parallelism
    Case("exact", batch="many", **SP2),
    Case("exact-bound", "untied", **SP2),
    Case("iterative", "qwen2", **SP2),
    Case("ridge", **SP2, batch="no-loss-token"),
    Case("exact-fused", "qwen2-untied", **SP2),
    Case("exact", **SP4),
    Case("exact-bound", "kv1", **SP4),
    Case("exact-half", "kv4", **SP4, batch="all-equal"),
    Case("iterative-fused", "kv1-bias", **SP4),
    # pipeline
    Case("exact", **PP2),
    Case("exact-bound", "untied", **PP2, batch="many"),
    Case("iterative-bound", "qwen2", **PP2, batch="five"),
    Case("ridge", **PP2, batch="single"),
    Case("exact-linear", **PP2),
    Case("exact", pipeline=4, batch="many"),
    Case("exact-bound", "untied", pipeline=4),
    Case("iterative", "qwen2", pipeline=4, batch="two"),
    # interleaved pipeline; "five" is filled up with an empty microbatch
    Case("exact", **VPP),
    Case("exact-bound", **VPP, batch="many"),
    Case("iterative", "untied", **VPP, batch="five"),
    Case("ridge", "qwen2", **VPP, batch="five"),
    Case("exact-bound", "deep", pipeline=4, virtual=2, batch="many"),
    Case("exact", tensor=2, **VPP, batch="five"),
    Case("exact-bound", **SP2, **VPP),
    # tensor x pipeline
    Case("exact", **GRID, batch="many"),
    Case("exact-bound", "untied", **GRID, sequence=True),
    Case("iterative-bound", "qwen2", **GRID),
    Case("exact", **GRID, sequence=True, batch="five"),
    Case("ridge-linear-fused", "kv1", **GRID),
    # replicas
    Case("exact", data=2),
    Case("exact-bound", "untied", data=2, batch="many"),
    Case("iterative", "qwen2", data=2, **SP2),
    Case("exact-bound", data=2, **PP2, batch="many"),
    Case("exact", data=2, **VPP),
    Case("ridge", data=2, tensor=2, batch="no-loss-token"),
    # recomputation
    Case("exact", recompute=True),
    Case("exact-bound", "qwen2", **SP2, recompute=True),
    Case("exact", **VPP, recompute=True),
    Case("exact", **GRID, sequence=True, recompute=True),
    # streaming, down to single rows
    Case("exact", block_bytes=4000),
    Case("exact-bound", "untied", block_bytes=0),
    Case("iterative-fused", "qwen2", **SP2, block_bytes=4000),
    Case("exact", **GRID, block_bytes=10_000, batch="five"),
    Case("ridge", "kv1", **SP2, block_bytes=4000),
    # sequences out of the ordinary
    Case("exact", tensor=2, batch="advantage-0"),
    Case("exact-bound", **SP2, batch="all-advantages-0"),
    Case("exact", **PP2, batch="one-loss-token"),
    Case("exact", **GRID, batch="no-loss-token"),
    Case("exact-linear", tensor=4, batch="twice"),
    Case("exact-bound", **SP2, batch="twice"),
    Case("exact", **VPP, batch="all-equal"),
    Case("exact", **GRID, sequence=True, batch="empty"),
    Case("exact", tensor=2, batch="eights"),
]


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
    VPP | SP2,
    {"data": 2},
    SP2 | {"data": 2},
    PP2 | {"data": 2},
    VPP | {"data": 2},
]
PRODUCT_CASES = [
    Case(projection, model, **layout)
    for layout, model, projection in itertools.product(
        PRODUCT_LAYOUTS, MODELS, ["exact", "exact-bound", "iterative-bound", "ridge-linear-fused"]
    )
]


@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_every_layout_equals_one_process(workers: WorkerPool, case: Case) -> None:
    check_layout(workers, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", PRODUCT_CASES, ids=str)
def test_the_product_of_layouts_equals_one_process(workers: WorkerPool, case: Case) -> None:
    check_layout(workers, case)


def check_layout(workers: WorkerPool, case: Case) -> None:
    chains = [
        unsharded(workers, case.model, case.projection, case.batch, replica, case.data)
        for replica in range(case.data)
    ]
    expected = {name: sum(chain[name] for chain in chains) for name in chains[0]}
    assert_equal(run(workers, case), expected, case.tolerance)  # type: ignore[arg-type]


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
