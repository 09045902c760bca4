"""Transformer Engine on one GPU, bfloat16 and FP8, against float64: ``pytest -m gpu``.

With ``-m te`` the same tests run on a CPU, with TE's Python and torch's kernels in place of its own
(`support/te_kernels.py`): so the tests themselves are known to work. Tolerances are 1.6 to 2 times
what was seen there, and are to be confirmed on a GPU.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from support.cases import assert_equal
from support.gpu_jobs import (
    backward_without_waiting,
    capabilities,
    gate_figures,
    gradients_of_rounded_weights,
    products,
)
from support.gradients import VOCAB, Batch, random_batch
from support.pool import WorkerPool
from support.te_jobs import WIDE, Seen, seen

from proma_megatron.config.fp8 import RECIPES, Recipe
from proma_megatron.config.model import ModelConfig, ParallelConfig
from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.types import TrainingSequence

# Heads of 64, two to a key head, as TE's attention kernels take them; dimensions are multiples of
# 128, which FP8 in blocks asks for.
MODEL = WIDE.model_copy(
    update={"heads": 4, "kv_heads": 2, "head_dim": 64, "backend": "transformer_engine"}
)


def resembling(count: int, microbatches: int) -> Batch:
    """Microbatches of like sequences, so that a projection has something to remove.

    Lengths are multiples of nothing. From microbatch to microbatch advantages are others, and the
    last third of the tokens.
    """
    draw = random.Random(11)
    (first,) = random_batch(11, [count])

    def another(sequence: TrainingSequence) -> TrainingSequence:
        kept = 2 * len(sequence.tokens) // 3
        rest = draw.choices(range(VOCAB), k=len(sequence.tokens) - kept)
        tokens = (*sequence.tokens[:kept], *rest)
        return dataclasses.replace(sequence, tokens=tokens, advantage=draw.gauss(0, 1))

    return [first, *([another(s) for s in first] for _ in range(microbatches - 1))]


BATCH = resembling(4, 3)
PLAIN = ProjectionConfig(rule="none")
RULES = {
    "none": PLAIN,
    "exact": ProjectionConfig(bound=0.5),
    "iterative": ProjectionConfig(rule="iterative", bound=0.5),
    "ridge": ProjectionConfig(rule="ridge", bound=0.5),
}
# Relative errors of a gradient tensor against float64, by the rounding of what is computed with:
# of the worst tensor, and their median. In FP8 the layers' own rounding is as large as what the
# projection changes: there the gate's figures and the operands say more.
TOLERANCES = {"none": (0.05, 0.03), "fp8": (0.5, 0.3)}
# A weight gradient of TE's own has been rounded to bfloat16, and FP8 products add up in less than
# float32 on Hopper.
ROUNDED = 1e-2
# What FP8 does to operands: E4M3 has 3 bits after the point and E5M2 2.
COARSE = (5e-3, 0.2)

recipes = pytest.mark.parametrize("fp8", RECIPES)
both_operands = pytest.mark.parametrize("operands", ["bfloat16", "fp8"])


@pytest.fixture(
    params=[
        pytest.param("te_gpu", marks=pytest.mark.gpu, id="gpu"),
        pytest.param("te_workers", marks=pytest.mark.te, id="cpu"),
    ]
)
def rank(request: pytest.FixtureRequest) -> WorkerPool:
    """Where policies have TE's layers: a GPU, or a CPU with stand-ins for its kernels."""
    return request.getfixturevalue(request.param)


def computing_in(rank: WorkerPool, fp8: Recipe) -> ModelConfig:
    """The model; skips the test where the GPU or its torch does not have the recipe."""
    if rank.device_type == "cuda":
        refusal = RECIPES[fp8].refusal(*rank.run(1, capabilities)[0])
        if refusal is not None:
            pytest.skip(f"FP8 {fp8} needs {refusal}")
    return MODEL.model_copy(update={"fp8": fp8})


def in_float64(workers: WorkerPool, projection: ProjectionConfig) -> dict[str, torch.Tensor]:
    """By Megatron-Core's layers on the CPU, of the same weights."""
    model = MODEL.model_copy(update={"backend": "torch", "dtype": "float64"})
    operands = projection.model_copy(update={"fp8_operands": "bfloat16"})
    return workers.run(
        1, gradients_of_rounded_weights, model=model, projection=operands, batch=BATCH
    )[0]


def check_gradients(
    found: dict[str, torch.Tensor],
    workers: WorkerPool,
    projection: ProjectionConfig,
    tolerances: tuple[float, float],
    comparison: str,
) -> None:
    """Against those of Megatron-Core's layers in float64, of the same weights."""
    expected = in_float64(workers, projection)
    worst, median = tolerances
    found = {name: value.double() for name, value in found.items()}
    assert_equal(found, expected, worst, comparison=comparison, case=projection.rule)
    errors = torch.stack(
        [(found[name] - value).norm() / value.norm() for name, value in expected.items()]
    )
    assert float(errors.median()) < median
    # Errors are noise and no direction: of the whole gradient much less is left.
    mine, own = (torch.cat([g[n].flatten() for n in expected]) for g in (found, expected))
    assert float(torch.cosine_similarity(mine, own, dim=0)) > 1 - worst**2 / 2


# --------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_gradients_are_those_of_float64(
    rank: WorkerPool, workers: WorkerPool, rule: str
) -> None:
    (found,) = rank.run(
        1, gradients_of_rounded_weights, model=MODEL, projection=RULES[rule], batch=BATCH
    )
    check_gradients(
        found,
        workers,
        RULES[rule],
        TOLERANCES["none"],
        f"Transformer Engine in bfloat16 on {rank.device_type} against float64",
    )


@pytest.mark.te
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "none"])
def test_the_tolerance_tells_a_projection_from_none(workers: WorkerPool, rule: str) -> None:
    plain, projected = in_float64(workers, PLAIN), in_float64(workers, RULES[rule])
    changes = [(plain[n] - value).norm() / value.norm() for n, value in projected.items()]
    assert float(torch.stack(changes).min()) > 2 * TOLERANCES["none"][0]


@both_operands
@pytest.mark.parametrize("rule", ["none", "exact"])
@recipes
def test_fp8_gradients_are_near_those_of_float64(
    rank: WorkerPool, workers: WorkerPool, fp8: Recipe, rule: str, operands: str
) -> None:
    model = computing_in(rank, fp8)
    projection = RULES[rule].model_copy(update={"fp8_operands": operands})
    (found,) = rank.run(
        1, gradients_of_rounded_weights, model=model, projection=projection, batch=BATCH
    )
    check_gradients(
        found,
        workers,
        projection,
        TOLERANCES["fp8"],
        f"FP8 {fp8}, {operands} operands, on {rank.device_type} against float64",
    )


@both_operands
@recipes
def test_the_gates_figures_are_small(rank: WorkerPool, fp8: Recipe, operands: str) -> None:
    model = computing_in(rank, fp8)
    projection = ProjectionConfig(fp8_operands=operands)  # type: ignore[arg-type]
    (figures,) = rank.run(1, gate_figures, model=model, projection=projection, batch=BATCH)
    assert figures is not None
    assert figures.beta_error is not None
    assert figures.removed_error is not None
    assert 0 < figures.beta_error < 0.2
    assert 0 < figures.removed_error < 0.2
    assert 0.99 < figures.cosine < 1
    assert 0.95 < figures.cosine_min < 1


# --------------------------------------------------------------------------- operands


def look(rank: WorkerPool, model: ModelConfig, **options: Any) -> list[Seen]:
    arguments = {"parallel": ParallelConfig(), "batch": BATCH[:1], **options}
    (found,) = rank.run(1, seen, model=model, **arguments)
    assert len(found) == 4 * model.layers
    return list(found.values())


def test_bfloat16_operands_are_what_went_through_the_layer(rank: WorkerPool) -> None:
    for layer in look(rank, MODEL, in_bfloat16=True):
        assert not layer.fp8
        assert (layer.x, layer.dy) == (0.0, 0.0)
        assert layer.product < ROUNDED


@recipes
def test_operands_are_those_before_fp8_to_the_last_bit(rank: WorkerPool, fp8: Recipe) -> None:
    for layer in look(rank, computing_in(rank, fp8), in_bfloat16=True):
        assert layer.fp8
        assert (layer.x, layer.dy) == (0.0, 0.0)


@recipes
def test_fp8_operands_are_those_of_the_layers_own_weight_gradient(
    rank: WorkerPool, fp8: Recipe
) -> None:
    for layer in look(rank, computing_in(rank, fp8), in_bfloat16=False):
        assert COARSE[0] < layer.x < COARSE[1]
        assert COARSE[0] < layer.dy < COARSE[1]
        assert layer.product < ROUNDED


@pytest.mark.parametrize("in_bfloat16", [True, False])
@recipes
def test_a_comparison_has_both(rank: WorkerPool, fp8: Recipe, in_bfloat16: bool) -> None:
    model = computing_in(rank, fp8)
    for layer in look(rank, model, in_bfloat16=in_bfloat16, compares=True):
        assert layer.high == 0.0
        assert layer.low is not None
        assert COARSE[0] < layer.low < COARSE[1]


# --------------------------------------------------------------------------- products, and the host


@pytest.mark.parametrize("lengths", [(5, 3, 17, 1), (64, 0, 31), (129,)], ids=str)
def test_products_from_odd_offsets_are_exact_but_for_float32(
    rank: WorkerPool, lengths: tuple[int, ...]
) -> None:
    engine = "transformer_engine"
    (errors,) = rank.run(1, products, engine=engine, lengths=lengths, rows=(32, 96))
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", ["none", *RECIPES])
@pytest.mark.parametrize("rule", ["exact", "iterative", "ridge"])
def test_a_projected_backward_pass_does_not_wait_for_the_gpu(
    te_gpu: WorkerPool, rule: str, fp8: Any
) -> None:
    model = MODEL if fp8 == "none" else computing_in(te_gpu, fp8)
    (looked,) = te_gpu.run(
        1, backward_without_waiting, model=model, projection=RULES[rule], batch=BATCH
    )
    assert looked == [0, 1, 2]
