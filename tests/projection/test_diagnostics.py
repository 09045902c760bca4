"""What is reported about a projection, against formulas on the vectors themselves."""

from __future__ import annotations

import itertools
from dataclasses import astuple
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gradients import TINY, Batch, random_batch, unit_figures
from support.paper import project_to_complement
from support.pool import WorkerPool

from proma_megatron.config.model import ParallelConfig
from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.projection import diagnostics
from proma_megatron.projection.diagnostics import Tally, UnitSums
from proma_megatron.projection.rules.proma import Rule, solve

NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.11.mlp.up_proj.weight")


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def near(value: float | tuple[float, ...]) -> Any:
    return pytest.approx(value, rel=1e-6, abs=1e-9)


def counted(
    tally: Tally,
    gradients: torch.Tensor,
    accumulated: torch.Tensor,
    advantages: torch.Tensor,
    rule: Rule = "exact",
    bound: float | None = None,
    names: tuple[str, ...] = NAMES,
) -> torch.Tensor:
    """Solve a batch of units, G^T (U, k, d) and A (U, d); what each loses (U, d)."""
    gram = gradients @ gradients.mT
    overlap = (gradients @ accumulated[..., None])[..., 0]
    solution = solve(rule, gram, overlap, advantages, shrinkage=1.0, bound=bound, cutoff=1e-11)
    tally.add(names, gram, accumulated.square().sum(dim=-1), advantages, solution)
    return ((advantages - solution.coefficients)[..., None, :] @ gradients)[..., 0, :]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    ks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    silent=st.booleans(),
)
def test_figures_of_a_unit_are_those_of_its_vectors(seed: int, ks: list[int], silent: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    tally = Tally()
    removed, energy, clamped, ranks, cosines, residuals = [], [], [], [], [], []
    products, squares, pairs, sequences = 0.0, 0.0, 0, 0
    for k in ks:
        gradients, accumulated = normal(generator, 2, k, 20), normal(generator, 2, 20)
        if silent:
            gradients[1, 0] = 0
        advantages = normal(generator, k)
        lost = counted(tally, gradients, accumulated, advantages, "ridge", bound=0.5)[1]
        g, a = gradients[1], accumulated[1]
        removed.append(float(lost.square().sum()))
        energy.append(float(a.square().sum()))
        policy = advantages @ g
        rest = project_to_complement("ridge", a, g.T)
        inside = a - rest
        clamped.append(float(inside.norm() > 0.5 * policy.norm()))
        gram = g @ g.T
        square = float((gram**2).sum())
        ranks.append(float(gram.trace() ** 2) / square if square else 0.0)
        found = [
            float(torch.nn.functional.cosine_similarity(x, y, dim=0))
            for x, y in itertools.combinations(g, 2)
            if x.any() and y.any()
        ]
        if found:
            cosines.append(sum(found) / len(found))
        residuals += [abs(float(rest @ x)) / float(x.norm() * a.norm()) for x in g if x.any()]
        x = advantages[:, None] * g
        products += float(sum(p @ q for p, q in itertools.permutations(x, 2)))
        squares += float(x.square().sum())
        pairs += k * (k - 1)
        sequences += k
    figures = tally.units()[NAMES[1]].figures()
    assert figures["removed_energy"] == near(sum(removed) / sum(energy))
    assert figures["clamp_rate"] == near(sum(clamped) / len(ks))
    assert figures["effective_rank"] == near(sum(ranks) / len(ks))
    assert figures["cosine"] == near(sum(cosines) / len(cosines) if cosines else 0.0)
    assert figures["orthogonality_residual"] == near(max(residuals, default=0.0))
    if products > 1e-9 * squares:
        assert figures["noise_scale"] == near((squares / sequences) / (products / pairs) - 1)
    elif products <= 0:
        assert "noise_scale" not in figures


def test_the_noise_scale_is_that_of_the_sequences_distribution() -> None:
    """tr(cov) / |mean|^2 of a known distribution, from many microbatches of four."""
    generator = torch.Generator().manual_seed(1)
    mean = normal(generator, 50)
    tally = Tally()
    for _ in range(2000):
        gradients = mean + 0.5 * normal(generator, 1, 4, 50)
        counted(tally, gradients, normal(generator, 1, 50), torch.ones(4).double(), names=("u",))
    expected = 0.25 * 50 / float(mean.square().sum())
    assert tally.units()["u"].noise_scale == pytest.approx(expected, rel=0.05)


def test_sums_add_up_over_microbatches_ranks_and_units() -> None:
    generator = torch.Generator().manual_seed(2)
    whole, parts = Tally(), [Tally(), Tally()]
    for step in range(4):
        arguments = (normal(generator, 2, 3, 10), normal(generator, 2, 10), normal(generator, 3))
        counted(whole, *arguments)
        counted(parts[step % 2], *arguments)
    merged = diagnostics.merge(part.units() for part in parts)
    assert merged.keys() == whole.units().keys() == set(NAMES)
    for name, sums in whole.units().items():
        assert merged[name].figures() == pytest.approx(sums.figures(), rel=1e-12)
    total = diagnostics.total(merged)
    assert total.solved == 8
    assert total.removed == pytest.approx(sum(sums.removed for sums in merged.values()))
    assert total.residual == max(sums.residual for sums in merged.values())


def test_figures_do_not_depend_on_when_they_are_counted() -> None:
    """Layer by layer or all at once; layers differ in units, microbatches in sequences."""
    at_once, at_the_end = Tally(), Tally()
    for k in (3, 1, 3):
        generator = torch.Generator().manual_seed(k)
        advantages = normal(generator, k)
        for names in (NAMES, ("model.norm.weight",)):
            gradients = normal(generator, len(names), k, 20)
            accumulated = normal(generator, len(names), 20)
            for tally in (at_once, at_the_end):
                counted(tally, gradients, accumulated, advantages, names=names)
            at_once.settle()
    early, late = at_once.units(), at_the_end.units()
    assert early.keys() == late.keys()
    for name, sums in early.items():
        assert astuple(sums) == near(astuple(late[name]))
    assert early["model.norm.weight"].solved == 3


def test_metrics_are_grouped_by_kind_and_by_layer() -> None:
    def sums(removed: float) -> UnitSums:
        return UnitSums(solved=1, removed=removed, accumulated=1)

    found = diagnostics.metrics(
        {
            "model.layers.0.mlp.up_proj.weight": sums(0.1),
            "model.layers.11.mlp.up_proj.weight": sums(0.3),
            "model.layers.11.self_attn.q_norm.weight": sums(0.5),
            "decoder.layers.11.self_attention.linear_qkv.weight": sums(0.7),
            "model.embed_tokens.weight": sums(0.9),
        }
    )
    energies = {key: value for key, value in found.items() if key.endswith("removed_energy")}
    assert energies == pytest.approx(
        {
            "projection/removed_energy": 0.5,
            "projection/kind/mlp.up_proj.weight/removed_energy": 0.2,
            "projection/kind/self_attn.q_norm.weight/removed_energy": 0.5,
            "projection/kind/self_attention.linear_qkv.weight/removed_energy": 0.7,
            "projection/kind/embed_tokens.weight/removed_energy": 0.9,
            "projection/layer/000/removed_energy": 0.1,
            "projection/layer/011/removed_energy": 0.5,
        }
    )


def test_without_projections_there_are_no_figures() -> None:
    assert diagnostics.metrics(Tally().units()) == {}
    assert UnitSums().figures() == {}


# --------------------------------------------------------------------------- layouts


BATCH: Batch = random_batch(1, [2, 3, 1, 3])


def figures_of(
    workers: WorkerPool, parallel: ParallelConfig, unit: str
) -> dict[str, dict[str, float]]:
    return workers.run(
        parallel.world_size,
        unit_figures,
        model=TINY.model_copy(update={"qkv_bias": True}),
        parallel=parallel,
        projection=ProjectionConfig(unit=unit),  # type: ignore[arg-type]
        batch=BATCH,
    )[0]


@pytest.mark.parametrize("unit", ["huggingface", "megatron"])
def test_every_layout_reports_the_same(workers: WorkerPool, unit: str) -> None:
    alone = figures_of(workers, ParallelConfig(), unit)
    per_layer = 14 if unit == "huggingface" else 9
    assert len(alone) == 4 * per_layer + 2
    for parallel in (
        ParallelConfig(tensor=2, sequence=True),
        ParallelConfig(pipeline=4),
        ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=2),
    ):
        found = figures_of(workers, parallel, unit)
        assert found.keys() == alone.keys()
        for name, figures in alone.items():
            assert figures["orthogonality_residual"] < 1e-12
            assert found[name] == pytest.approx(figures, rel=1e-8, abs=1e-12), name


def test_two_replicas_report_both_chains(workers: WorkerPool) -> None:
    """Each replica projects once, onto its second microbatch: two solves instead of three."""
    alone = workers.run(
        1,
        unit_figures,
        model=TINY,
        parallel=ParallelConfig(),
        projection=ProjectionConfig(),
        batch=BATCH,
        raw=True,
    )[0]
    both = workers.run(
        2,
        unit_figures,
        model=TINY,
        parallel=ParallelConfig(data=2),
        projection=ProjectionConfig(),
        batch=BATCH,
        raw=True,
    )[0]
    assert {sums.solved for sums in alone.values()} == {3}
    assert {sums.solved for sums in both.values()} == {2}
    assert {sums.sequences for sums in both.values()} == {1 + 3}
