"""What FP8 operands change, against the same on vectors of each unit's full dimension."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.paper import complement, isopo_advantages
from support.pool import WorkerPool
from support.validity import CPU, Case, Weight, alone, looked, looked_together, packed

from proma_megatron.config.model import ParallelConfig
from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.projection.factors.contraction import Rows
from proma_megatron.projection.factors.workspace import Workspace
from proma_megatron.projection.fp8_gate import Difference, FP8Gate, GateFigures, Pair, warning
from proma_megatron.projection.updaters.registry import make_updater
from proma_megatron.weights.shards import Reduction

QKV: dict[str, Rows] = {  # two tensor ranks cut it in halves, and the second has no row of k
    "layers.0.q": ((0, 2), (6, 10)),
    "layers.0.k": ((2, 4),),
    "layers.0.v": ((4, 6), (10, 12)),
}
LENGTHS = (5, 3, 9)


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def weight(generator: torch.Generator, units: dict[str, Rows], **options: Any) -> Weight:
    """Operands that differ by a tenth, with garbage where no sequence is."""
    tokens, rows, width = 24, max(stop for unit in units.values() for _, stop in unit), 6
    x, dy = normal(generator, tokens, width), normal(generator, tokens, rows)
    fp8_x, fp8_dy = (part * (1 + 0.1 * normal(generator, *part.shape)) for part in (x, dy))
    for part in (x, dy, fp8_x, fp8_dy):
        part[sum(LENGTHS) :] *= 1e3 * normal(generator, 1)
    accumulated = 5 * normal(generator, rows, width)
    return Weight(units, (x, dy), (fp8_x, fp8_dy), accumulated, **options)


def case(seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    weights = (
        weight(generator, QKV),
        weight(generator, {"layers.0.o": ((0, 8),)}, axis=1),
        weight(generator, {"layers.0.router": ((0, 4),)}, reduction=Reduction.REPLICATED),
        weight(generator, {"layers.1.up": ((0, 10),), "layers.1.gate": ((10, 20),)}),
    )
    return Case(weights, LENGTHS, normal(generator, len(LENGTHS)))


def settings(rule: str = "exact", bound: float | None = 0.5, **options: Any) -> ProjectionConfig:
    return ProjectionConfig(rule=rule, bound=bound, **options)  # type: ignore[arg-type]


def gate_of(config: ProjectionConfig) -> FP8Gate:
    return FP8Gate(config, make_updater(config, alone().tensor, torch.float64).solve)


def directly(given: Case, config: ProjectionConfig) -> list[Difference]:
    """From G, G' and A themselves; sequences are independent, so that coefficients are known."""
    found = []
    for of_weight in given.weights:
        for name, rows in of_weight.units.items():
            wanted = [row for start, stop in rows for row in range(start, stop)]
            before = of_weight.accumulated[wanted].flatten()
            plain, fp8 = (given.gradients(o, rows) for o in (of_weight.operands, of_weight.fp8))
            after, removed = updated(plain, before, given.advantages, config)
            fp8_after, fp8_removed = updated(fp8, before, given.advantages, config)
            b, fp8_b = (
                plain.norm(dim=0) * torch.linalg.lstsq(g, r[:, None]).solution[:, 0]
                for g, r in ((plain, removed), (fp8, fp8_removed))
            )
            takes = bool(removed.norm() > 0)
            found.append(
                Difference(
                    name,
                    float((fp8_b - b).norm() / b.norm()) if takes else None,
                    float((fp8_removed - removed).norm() / removed.norm()) if takes else None,
                    float(after @ fp8_after),
                    float(after @ after),
                    float(fp8_after @ fp8_after),
                )
            )
    return found


def updated(
    gradients: torch.Tensor,
    before: torch.Tensor,
    advantages: torch.Tensor,
    config: ProjectionConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (d,) after the microbatch, and what the rule took off A or the microbatch."""
    policy = gradients @ advantages
    if config.rule == "subspace":
        return before + policy, torch.zeros_like(before)
    if config.rule in ("kernel", "norm"):
        left = isopo_advantages(config.rule, gradients, advantages, config.regularization)
        return before + gradients @ left, gradients @ (advantages - left)
    rest = complement(before, gradients, policy, config)
    return rest + policy, before - rest


def summed_up(differences: list[Difference]) -> dict[str, float]:
    cosines = [d.product / (d.square * d.fp8_square) ** 0.5 for d in differences]
    product, square, fp8_square = (
        sum(getattr(d, key) for d in differences) for key in ("product", "square", "fp8_square")
    )
    found = {
        "fp8/gradient_cosine": product / (square * fp8_square) ** 0.5,
        "fp8/gradient_cosine_min": min(cosines),
    }
    errors = [d.beta_error for d in differences if d.beta_error is not None]
    removed = [d.removed_error for d in differences if d.removed_error is not None]
    if errors:
        found |= {
            "fp8/beta_error": statistics.median(errors),
            "fp8/beta_error_max": max(errors),
            "fp8/removed_error": statistics.median(removed),
        }
    return found


def near(value: dict[str, float], absolute: float = 1e-12) -> Any:
    return pytest.approx(value, rel=1e-7, abs=absolute)


def found(given: Case, config: ProjectionConfig, **options: Any) -> GateFigures:
    figures = looked(given, config, alone(), **options)
    assert figures is not None
    return figures


# --------------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("rule", "bound"),
    [
        *itertools.product(["exact", "iterative", "ridge"], [None, 0.5, 0.05]),
        *((rule, None) for rule in ("kernel", "norm", "subspace")),
    ],
)
def test_figures_are_those_of_the_vectors(rule: str, bound: float | None) -> None:
    for seed in range(2):
        given, config = case(seed), settings(rule, bound, shrinkage=0.8)
        expected = directly(given, config)
        figures = found(given, config)
        assert figures.metrics() == near(summed_up(expected))
        assert ("fp8/beta_error" in figures.metrics()) == (rule != "subspace")
        worst = max(expected, key=lambda d: d.beta_error or 0)
        assert figures.beta_worst == (None if rule == "subspace" else worst.unit)
        assert figures.cosine_worst == min(expected, key=lambda d: d.cosine).unit


@pytest.mark.parametrize("rule", ["exact", "iterative", "ridge", "kernel", "norm"])
def test_equal_operands_change_nothing(rule: str) -> None:
    given = case()
    same = replace(given, weights=tuple(replace(w, fp8=w.operands) for w in given.weights))
    metrics = found(same, settings(rule)).metrics()
    wrong = dict.fromkeys(("fp8/beta_error", "fp8/beta_error_max", "fp8/removed_error"), 0.0)
    right = dict.fromkeys(("fp8/gradient_cosine", "fp8/gradient_cosine_min"), 1.0)
    assert metrics == pytest.approx(wrong | right, abs=1e-13)


def test_before_anything_is_accumulated_only_the_cosine_says_something() -> None:
    given = case()
    first, *others = given.weights
    fresh = [replace(w, accumulated=torch.zeros_like(w.accumulated)) for w in others]
    config = settings()
    some = replace(given, weights=(first, *fresh))
    figures = found(some, config).metrics()
    assert figures == near(summed_up(directly(some, config)))
    assert figures["fp8/beta_error"] == pytest.approx(
        statistics.median(d.beta_error or 0 for d in directly(given, config)[:3])
    )
    none = found(replace(given, weights=tuple(fresh)), config)
    assert none.metrics().keys() == {"fp8/gradient_cosine", "fp8/gradient_cosine_min"}
    assert warning(none, settings(fp8_gate_beta=1e-9, fp8_gate_cosine=0.5)) is None


def test_small_differences_keep_their_digits() -> None:
    """Of K' - K and |A'|^2 - |A|^2 nothing would be left."""
    given, factor = case(), 1 + 1e-9

    def scaled(of: Weight) -> Weight:
        x, dy = of.operands
        return replace(of, fp8=(x, dy * factor))

    changed = replace(given, weights=tuple(map(scaled, given.weights)))
    figures = found(changed, settings(bound=None))
    # G' = factor G: the same is removed, with beta / factor.
    assert figures.beta_error == pytest.approx(1e-9, rel=1e-4)
    assert figures.removed_error is not None
    assert figures.removed_error < 1e-13


# --------------------------------------------------------------------------- forming M


class Recording(Workspace):
    """Knows what was asked for."""

    def __init__(self, limit: float) -> None:
        super().__init__(limit, CPU)
        self.asked: list[int] = []

    def scratch(self, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        self.asked.append(math.prod(shape) * dtype.itemsize)
        return super().scratch(shape, dtype)


def test_blocks_give_what_the_whole_gives_in_little_memory() -> None:
    """Four rows at a time; units of several runs begin and end within blocks."""
    given, row = case(), (2 * len(LENGTHS) + 1) * 6 * 8
    given = replace(given, weights=given.weights[:1])
    small, large = Recording(2 * 4 * row), Recording(2**20)
    figures = [found(given, settings(), workspace=workspace) for workspace in (small, large)]
    assert figures[0].metrics() == near(figures[1].metrics())
    assert large.asked == [12 * row]
    assert small.asked == [4 * row] * 3
    assert small.held == 0


def test_tokens_of_no_sequence_and_what_is_not_projected_count_nowhere() -> None:
    given, total = case(), sum(LENGTHS)

    def spoiled(operands: Pair) -> Pair:
        x, dy = (part.clone() for part in operands)
        x[total:], dy[total:] = torch.nan, torch.inf
        return x, dy

    bad = tuple(replace(w, operands=spoiled(w.operands), fp8=spoiled(w.fp8)) for w in given.weights)
    assert found(replace(given, weights=bad), settings()) == found(given, settings())
    gate, microbatch = gate_of(settings()), given.microbatch()
    gate.arm([microbatch])
    for of in given.weights:
        units = of.shard_units(projected=False)
        workspace = Workspace(2**20, CPU)
        gate.look(microbatch, units, of.operands, of.fp8, of.accumulated, workspace)
    assert gate.figures(alone()) is None


def test_weights_may_come_in_any_order_and_twice() -> None:
    """As those of a microbatch do under interleaved pipelines; and one whose pass is repeated."""
    given = case()
    again = replace(given, weights=(*given.weights[::-1], given.weights[0]))
    assert found(again, settings()).metrics() == near(found(given, settings()).metrics())


# --------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("rule", ["exact", "kernel"])
@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(tensor=2), ParallelConfig(pipeline=2), ParallelConfig(tensor=2, pipeline=2)],
    ids=str,
)
def test_every_layout_finds_the_same(
    workers: WorkerPool, parallel: ParallelConfig, rule: str
) -> None:
    given, config = case(), settings(rule)
    assert given.weights[0].part(1, 2).units["layers.0.k"] == ()
    expected = found(given, config)
    arguments = {"cases": [given], "config": config, "parallel": parallel}
    ranks = workers.run(parallel.world_size, looked_together, **arguments)
    for figures in ranks:
        assert figures == ranks[0]
        assert figures.metrics() == near(expected.metrics())
        assert figures.beta_worst == expected.beta_worst
        assert figures.cosine_worst == expected.cosine_worst


def test_replicas_look_at_microbatches_of_their_own(workers: WorkerPool) -> None:
    """One of them may have no weights to look at; the others' are what is reported."""
    cases, config = [case(0), case(1)], settings()
    both = [d for given in cases for d in directly(given, config)]
    arguments: dict[str, Any] = {"config": config, "parallel": ParallelConfig(data=2)}
    ranks = workers.run(2, looked_together, cases=cases, **arguments)
    assert ranks[0] == ranks[1]
    assert ranks[0].metrics() == near(summed_up(both))
    silent = [cases[0], replace(cases[1], weights=())]
    ranks = workers.run(2, looked_together, cases=silent, **arguments)
    assert ranks[0] == ranks[1] == found(cases[0], config)


@pytest.mark.parametrize("rule", ["exact", "norm", "subspace"])
def test_what_is_not_finite_on_one_rank_is_told_on_all(workers: WorkerPool, rule: str) -> None:
    given, config = case(), settings(rule)
    given.weights[3].fp8[1][0, 19] = torch.nan  # of the second tensor rank, on the second stage
    parallel = ParallelConfig(tensor=2, pipeline=2)
    arguments = {"cases": [given], "config": config, "parallel": parallel}
    for figures in workers.run(4, looked_together, **arguments):
        assert all(math.isnan(value) for value in figures.metrics().values())
        assert len(figures.metrics()) == 5
        text = warning(figures, config)
        assert text is not None
        assert "layers.1.gate" in text
        assert "not finite" in text


# --------------------------------------------------------------------------- when


def test_it_is_due_at_the_first_step_and_every_few() -> None:
    def steps(every: int, first: int) -> list[int]:
        gate = gate_of(settings(fp8_gate_every=every))
        return [step for step in range(first, first + 10) if gate.due(step) and gate.due(step)]

    assert steps(4, 1) == [1, 4, 8]
    assert steps(4, 7) == [7, 8, 12, 16]  # a run that goes on from a checkpoint
    assert steps(0, 1) == [1]


@pytest.mark.parametrize(
    ("counts", "wanted"),
    [((2, 2, 2), 1), ((2, 0, 2, 2), 2), ((0, 2, 2), 2), ((0, 2, 0), 1), ((3,), 0), ((0, 0), None)],
)
def test_the_second_microbatch_with_sequences_is_looked_at(
    counts: tuple[int, ...], wanted: int | None
) -> None:
    """Where there is only one, that one; captures of any number come again and again."""
    microbatches = [packed((3,) * k, index, (1.0,) * k) for index, k in enumerate(counts)]
    gate = gate_of(settings())
    assert not gate.armed
    assert not any(map(gate.wants, microbatches))
    gate.arm(microbatches)
    assert gate.armed
    for _ in range(2):
        assert [m.index for m in microbatches if gate.wants(m)] == (
            [] if wanted is None else [wanted]
        )
    assert gate.figures(alone()) is None
    assert not gate.armed
    assert not any(map(gate.wants, microbatches))


# --------------------------------------------------------------------------- warnings

WORST = "model.layers.3.self_attn.k_proj.weight"
BAD = GateFigures(0.31, 0.62, WORST, 0.2, 0.97, 0.9, "model.layers.5.mlp.up_proj.weight")


def test_a_warning_names_value_key_and_fix() -> None:
    used = settings(fp8_operands="fp8")
    text = warning(replace(BAD, cosine=0.999), used)
    assert text == (
        "FP8 operands change beta by 31.0% (median; projection.fp8_gate_beta is 0.2) and what "
        f"is removed by 20.0%, worst at {WORST} (62.0% of beta); use "
        "projection.fp8_operands=bfloat16, model.fp8_skip_first or model.fp8_skip_last, or "
        "another model.fp8"
    )
    text = warning(replace(BAD, beta_error=0.1), used)
    assert text is not None
    assert text.startswith(
        "FP8 operands turn the accumulated gradient, to a cosine of 0.9700 "
        "(projection.fp8_gate_cosine is 0.99), worst at model.layers.5.mlp.up_proj.weight (0.9000);"
    )
    both = warning(BAD, used)
    assert both is not None
    assert "change beta by 31.0%" in both
    assert "and turn the accumulated gradient" in both
    assert warning(replace(BAD, beta_error=0.2, cosine=0.99), used) is None
    assert warning(replace(BAD, beta_error=None, cosine=0.99), used) is None


def test_where_fp8_operands_are_not_in_use_nothing_is_to_be_changed() -> None:
    text = warning(BAD, settings())
    assert text is not None
    assert "would change beta by 31.0%" in text
    assert text.endswith("; keep projection.fp8_operands=bfloat16")


# --------------------------------------------------------------------------- FP8 itself


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Through FP8 and back, with one scale for the tensor."""
    scale = torch.finfo(dtype).max / values.abs().max()
    return ((values * scale).to(dtype).float() / scale).bfloat16()


@pytest.mark.parametrize("rule", ["exact", "iterative", "ridge", "kernel", "norm"])
def test_fp8_rounding_is_seen_and_is_small(rule: str) -> None:
    """X in e4m3 has 2.6% of rounding error, dY in e5m2 5.2%: together 6% of a sequence gradient."""
    generator = torch.Generator().manual_seed(0)
    lengths, out, width = (40, 50, 60, 30), 64, 64

    def operands() -> Pair:
        tokens = 184
        return (
            normal(generator, tokens, width).bfloat16(),
            normal(generator, tokens, out).bfloat16(),
        )

    before = operands()
    accumulated = before[1].float().T @ before[0].float()
    x, dy = operands()
    fp8 = rounded(x, torch.float8_e4m3fn), rounded(dy, torch.float8_e5m2)
    of = Weight({"up": ((0, out),)}, (x, dy), fp8, accumulated)
    given = Case((of,), lengths, normal(generator, len(lengths)))
    figures = found(given, settings(rule), dtype=torch.bfloat16)
    assert figures.beta_error is not None
    assert figures.removed_error is not None
    assert 1e-3 < figures.beta_error < 0.15
    assert 0.03 < figures.removed_error < 0.2
    assert 0.99 < figures.cosine < 0.9999


def test_nearly_parallel_sequences_trade_coefficients_and_little_else() -> None:
    """What beta's error can't tell from harm, and the removed part's can."""
    generator, lengths, spread = torch.Generator().manual_seed(0), (40,) * 4, 0.03
    x, dy = normal(generator, 40, 64), normal(generator, 40, 64)
    accumulated = (dy.T @ x + 5 * normal(generator, 64, 64)).float()

    def copies(part: torch.Tensor) -> torch.Tensor:
        return (part.repeat(5, 1) + spread * normal(generator, 200, 64)).bfloat16()

    x, dy = copies(x), copies(dy)
    fp8 = rounded(x, torch.float8_e4m3fn), rounded(dy, torch.float8_e5m2)
    of = Weight({"up": ((0, 64),)}, (x, dy), fp8, accumulated)
    given = Case((of,), lengths, normal(generator, len(lengths)))
    figures = found(given, settings(bound=None), dtype=torch.bfloat16)
    assert figures.beta_error is not None
    assert figures.removed_error is not None
    assert figures.removed_error < 0.15
    assert figures.beta_error > 2 * figures.removed_error


def test_a_silent_unit_is_unchanged_unless_fp8_alone_silences_it() -> None:
    assert Difference("up", None, None, 0.0, 0.0, 0.0).cosine == 1
    assert Difference("up", None, None, 0.0, 2.0, 0.0).cosine == 0
