"""One optimizer step is the same in every layout, and is Adam on the gradient that was reported."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from support.gradients import TINY, VOCAB, Batch, gradients, random_batch
from support.pool import WorkerPool
from support.slow import all_but
from support.training import Update, optimizer_steps

from proma_megatron.config.model import ModelConfig, ParallelConfig
from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.config.trainer import OptimizerConfig
from proma_megatron.weights.mapping import tensor_shapes

Tensors = dict[str, torch.Tensor]
Step = Callable[..., list[Update]]

BATCH = random_batch(1, [2, 3, 1, 2])
# eps is of the size of a clipped gradient's entries, so that Adam is not blind to its scale.
OPTIMIZER = OptimizerConfig(lr=0.01, warmup_steps=4, weight_decay=0.1, eps=1e-3, clip_grad=0.0)
CLIPPED = OPTIMIZER.model_copy(update={"clip_grad": 0.5})
UNTIED = TINY.model_copy(update={"tie_embeddings": False, "qkv_bias": True})
FLOAT32 = TINY.model_copy(update={"dtype": "float32"})
LAYOUTS = {
    "TP2": ParallelConfig(tensor=2),
    "SP2": ParallelConfig(tensor=2, sequence=True),
    "TP4": ParallelConfig(tensor=4),
    "PP2": ParallelConfig(pipeline=2),
    "VPP2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "TP2xPP2": ParallelConfig(tensor=2, pipeline=2),
    "SP2xPP2": ParallelConfig(tensor=2, pipeline=2, sequence=True),
    "DP2": ParallelConfig(data=2),
    "DP2xTP2": ParallelConfig(data=2, tensor=2),
    "DP2xPP2": ParallelConfig(data=2, pipeline=2),
}


@pytest.fixture(scope="module")
def step(workers: WorkerPool) -> Step:
    """Steps on the batch by rank; `layout` is a name above."""

    def run(
        layout: str = "",
        model: ModelConfig = TINY,
        optimizer: OptimizerConfig = OPTIMIZER,
        steps: int = 2,
        batch: Batch = BATCH,
    ) -> list[Update]:
        parallel = LAYOUTS[layout] if layout else ParallelConfig()
        return workers.run(
            parallel.model_size * (parallel.data or 1),
            optimizer_steps,
            model=model,
            parallel=parallel,
            optimizer=optimizer,
            batch=batch,
            steps=steps,
        )

    return run


@pytest.fixture(scope="module")
def one_rank(step: Step) -> dict[str, Update]:
    """Two steps on one rank."""
    cases = {
        "tied": (TINY, OPTIMIZER),
        "clipped": (TINY, CLIPPED),
        "untied": (UNTIED, OPTIMIZER),
        "float32": (FLOAT32, CLIPPED),
    }
    return {name: step("", model, optimizer)[0] for name, (model, optimizer) in cases.items()}


def with_(**changes: object) -> OptimizerConfig:
    return OPTIMIZER.model_copy(update=changes)


def assert_equal(found: Tensors, expected: Tensors, atol: float) -> None:
    """Equal by name, with every tensor that differs in the message."""
    assert found.keys() == expected.keys()
    worst = {name: float((found[name] - expected[name]).abs().max()) for name in expected}
    wrong = {name: error for name, error in worst.items() if not error <= atol}
    assert not wrong, wrong


def movement(update: Update) -> float:
    """The largest change of any weight."""
    return max(float((update.after[n] - update.before[n]).abs().max()) for n in update.before)


# --------------------------------------------------------------------------- layouts


def assert_same_step(ranks: list[Update], expected: Update, atol: float) -> None:
    assert_equal(ranks[0].before, expected.before, 0)
    assert_equal(ranks[0].after, expected.after, atol)
    for rank in ranks:
        for found, wanted in zip(rank.metrics, expected.metrics, strict=True):
            # Megatron adds up the squares in float32, whatever the gradients are.
            assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("layout", all_but(LAYOUTS, ["TP2", "PP2", "TP2xPP2"]))
def test_layout_changes_neither_the_new_weights_nor_the_norm(
    step: Step, one_rank: dict[str, Update], layout: str
) -> None:
    ranks = step(layout)
    assert_same_step(ranks, one_rank["tied"], 1e-10)
    assert_equal(ranks[0].gradients, one_rank["tied"].gradients, 1e-10)
    assert set(ranks[0].gradients) == set(tensor_shapes(TINY, VOCAB))


@pytest.mark.parametrize("layout", ["SP2xPP2", "DP2xPP2"])
def test_layout_changes_no_clipped_step(
    step: Step, one_rank: dict[str, Update], layout: str
) -> None:
    assert_same_step(step(layout, optimizer=CLIPPED), one_rank["clipped"], 1e-8)


@pytest.mark.parametrize("layout", ["SP2", "PP2", "DP2xPP2"])
def test_layout_changes_no_step_of_an_untied_model_with_biases(
    step: Step, one_rank: dict[str, Update], layout: str
) -> None:
    assert_same_step(step(layout, UNTIED), one_rank["untied"], 1e-10)


@pytest.mark.parametrize("layout", ["", "DP2", "DP2xTP2", "DP2xPP2"])
def test_distributed_optimizer_gives_the_same_new_weights(
    step: Step, one_rank: dict[str, Update], layout: str
) -> None:
    distributed = CLIPPED.model_copy(update={"distributed": True})
    assert_same_step(step(layout, FLOAT32, distributed), one_rank["float32"], 2e-6)


def test_float32_step_is_the_float64_step_rounded(one_rank: dict[str, Update]) -> None:
    rounded = {name: value.double() for name, value in one_rank["float32"].after.items()}
    assert_equal(rounded, one_rank["clipped"].after, 5e-6)


def test_sums_of_replicas_add_up_to_those_of_one_rank(
    step: Step, one_rank: dict[str, Update]
) -> None:
    whole = one_rank["tied"].sums
    assert whole.tokens == sum(s.loss_tokens for part in BATCH for s in part)
    ranks = step("DP2xPP2")
    replicas = {}
    for rank in ranks:
        replicas.setdefault((rank.sums.tokens, rank.sums.objective), []).append(rank.sums)
    assert sorted(len(stages) for stages in replicas.values()) == [2, 2]
    first, second = (stages[0] for stages in replicas.values())
    for name, value in (first + second).__dict__.items():
        assert value == pytest.approx(getattr(whole, name), rel=1e-10), name


# --------------------------------------------------------------------------- Adam


def adam(
    before: Tensors, grads: list[Tensors], config: OptimizerConfig, rates: list[float]
) -> Tensors:
    """AdamW (arXiv:1711.05101, algorithm 2) with clipping; matrices alone decay."""
    weights = {name: value.clone() for name, value in before.items()}
    first = {name: torch.zeros_like(value) for name, value in before.items()}
    second = {name: torch.zeros_like(value) for name, value in before.items()}
    for t, (found, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        norm = math.sqrt(sum(float(g.square().sum()) for g in found.values()))
        scale = min(1.0, config.clip_grad / norm) if config.clip_grad else 1.0
        for name, weight in weights.items():
            grad = scale * found[name]
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * grad
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * grad**2
            mean = first[name] / (1 - config.beta1**t)
            deviation = (second[name] / (1 - config.beta2**t)).sqrt()
            if weight.dim() > 1:
                weight *= 1 - rate * config.weight_decay
            weight -= rate * mean / (deviation + config.eps)
    return weights


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_two_steps_are_adam_with_decay_on_the_clipped_gradients(step: Step, clip: float) -> None:
    config = with_(clip_grad=clip)
    (first,), (both,) = step(optimizer=config, steps=1), step(optimizer=config, steps=2)
    rates = [config.lr * 1 / config.warmup_steps, config.lr * 2 / config.warmup_steps]
    grads = [first.gradients, both.gradients]
    # Megatron divides by norm + 1e-6.
    assert_equal(first.after, adam(first.before, grads[:1], config, rates[:1]), 1e-7)
    assert_equal(both.after, adam(first.before, grads, config, rates), 1e-7)
    assert movement(both) > 1e-3


def test_reported_norm_is_that_of_the_gradient_before_clipping(one_rank: dict[str, Update]) -> None:
    for update in one_rank.values():
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in update.gradients.values()))
        assert norm > 2 * CLIPPED.clip_grad
        assert update.metrics[-1]["optimizer/grad_norm"] == pytest.approx(norm, rel=1e-6)


def test_clipping_really_shortens_the_step(step: Step) -> None:
    free, clipped, loose = (
        step(optimizer=with_(clip_grad=clip, eps=1.0, weight_decay=0.0), steps=1)[0]
        for clip in (0.0, 0.01, 1e6)
    )
    assert movement(clipped) < 0.02 * movement(free)
    assert_equal(loose.after, free.after, 1e-12)
    norms = [update.metrics[0]["optimizer/grad_norm"] for update in (free, clipped, loose)]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-12)
    assert norms[0] > 1


def test_warm_up_rises_from_one_part_of_the_rate_to_the_whole_and_stays(step: Step) -> None:
    (update,) = step(optimizer=with_(warmup_steps=3), steps=5)
    rates = [metrics["optimizer/lr"] for metrics in update.metrics]
    assert rates == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01, 0.01], rel=1e-12)
    (sudden,) = step(optimizer=with_(warmup_steps=0), steps=1)
    assert sudden.metrics[0]["optimizer/lr"] == pytest.approx(0.01, rel=1e-12)


def test_linear_decay_would_reach_the_least_rate_one_update_after_the_last(
    workers: WorkerPool,
) -> None:
    config = with_(warmup_steps=1, decay="linear", min_lr=0.002)
    (update,) = workers.run(
        1,
        optimizer_steps,
        model=TINY,
        parallel=ParallelConfig(),
        optimizer=config,
        batch=BATCH[:1],
        steps=5,
        total_steps=5,
    )
    rates = [metrics["optimizer/lr"] for metrics in update.metrics]
    # At the least rate itself, which is 0 by default, the last update would be lost work.
    assert rates == pytest.approx([0.01, 0.0084, 0.0068, 0.0052, 0.0036], rel=1e-12)


def test_a_later_step_does_not_remember_the_gradient_of_an_earlier_one(step: Step) -> None:
    still = with_(lr=1e-300, warmup_steps=0, weight_decay=0.0)
    (once,), (thrice,) = step(optimizer=still, steps=1), step(optimizer=still, steps=3)
    assert_equal(thrice.gradients, once.gradients, 0)


# --------------------------------------------------------------------------- gradients


@pytest.fixture(scope="module")
def plain(workers: WorkerPool) -> Callable[..., Tensors]:
    def run(batch: Batch, **changes: object) -> Tensors:
        return workers.run(
            1,
            gradients,
            model=TINY.model_copy(update=changes),
            parallel=ParallelConfig(),
            projection=ProjectionConfig(rule="none"),
            batch=batch,
        )[0]

    return run


def test_how_sequences_are_cut_into_microbatches_does_not_change_the_plain_gradient(
    plain: Callable[..., Tensors],
) -> None:
    (flat,) = random_batch(2, [6])
    whole = plain([flat])
    assert max(float(g.abs().max()) for g in whole.values()) > 0.1
    for cuts in ([0, 3, 6], [0, 1, 3, 6], [0, 1, 2, 3, 4, 5, 6]):
        parts = [flat[a:b] for a, b in pairwise(cuts)]
        assert_equal(plain(parts), whole, 1e-12)
    assert_equal(plain([flat[::-1]]), whole, 1e-12)
    assert_equal(plain([flat, []]), whole, 1e-12)


def test_recompute_changes_no_gradient(plain: Callable[..., Tensors]) -> None:
    assert_equal(plain(BATCH, recompute="full"), plain(BATCH), 1e-14)


# --------------------------------------------------------------------------- bfloat16


@pytest.mark.parametrize(("layout", "distributed"), [("", False), ("SP2", False), ("DP2", True)])
def test_bfloat16_trains_with_float32_gradients_near_the_exact_ones(
    step: Step, one_rank: dict[str, Update], layout: str, distributed: bool
) -> None:
    model = TINY.model_copy(update={"dtype": "bfloat16"})
    ranks = step(layout, model, with_(distributed=distributed, warmup_steps=0))
    update = ranks[0]
    for rank in ranks:
        assert rank.grad_dtypes == {torch.float32}
        assert all(math.isfinite(value) for m in rank.metrics for value in m.values())
    assert all(value.dtype == torch.bfloat16 for value in update.after.values())
    assert all(bool(value.isfinite().all()) for value in update.after.values())
    assert movement(update) > 1e-3
    expected = one_rank["tied"].metrics[0]["optimizer/grad_norm"]
    assert update.metrics[0]["optimizer/grad_norm"] == pytest.approx(expected, rel=0.03)
