"""What is solved without eigenvalues is what is solved with them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any
from unittest import mock

import pytest
import torch

from proma_megatron.projection import host_sync
from proma_megatron.projection.rules.cholesky import pivoted_factor
from proma_megatron.projection.rules.isopo import precondition
from proma_megatron.projection.rules.proma import Outcome, solve, solve_vectors

ENTRIES, CUTOFF = 60, 1e-11


def units(k: int) -> torch.Tensor:
    """G^T (units, k, n): independent, graded, alike, equal, twice, silent, not finite."""
    generator = torch.Generator().manual_seed(k)
    free = torch.randn(k, ENTRIES, generator=generator, dtype=torch.float64)
    graded = free * torch.logspace(-6, 3, k, dtype=torch.float64)[:, None]
    alike = free[:1] + 0.1 * free
    twice = free[torch.arange(k) // 2]
    silent = free.clone()
    silent[::2] = 0
    bad = free.clone()
    bad[0, 0], bad[-1, 1] = torch.nan, torch.inf
    return torch.stack([free, bad, graded, alike, free[:1].expand(k, -1), twice, silent, 0 * free])


def both_ways(function: Any, *arguments: Any, **options: Any) -> tuple[Any, Any]:
    expected = function(*arguments, **options)
    with mock.patch.object(host_sync, "asynchronous", return_value=True):
        return function(*arguments, **options), expected


def check(found: Outcome, expected: Outcome, tolerance: float) -> None:
    assert found.finite.tolist() == [True, False, *[True] * 6]
    for field in fields(Outcome):
        mine, own = (getattr(outcome, field.name)[expected.finite] for outcome in (found, expected))
        torch.testing.assert_close(mine, own, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("k", [1, 2, 7, 16])
@pytest.mark.parametrize("rule", ["exact", "ridge"])
@pytest.mark.parametrize("bound", [None, 0.5])
def test_projections_agree(k: int, rule: Any, bound: float | None) -> None:
    gradients = units(k)
    generator = torch.Generator().manual_seed(1)
    accumulated = torch.randn(8, ENTRIES, generator=generator, dtype=torch.float64)
    advantages = torch.randn(k, generator=generator, dtype=torch.float64)
    gram = gradients @ gradients.mT
    overlap = (gradients @ accumulated[..., None])[..., 0]
    options = {"shrinkage": 1.0, "bound": bound, "cutoff": CUTOFF}
    found, expected = both_ways(solve, rule, gram, overlap, advantages, **options)
    check(found, expected, 1e-11)
    good = expected.finite
    change, own = (
        (gradients[good].mT @ solution.coefficients[good][..., None])[..., 0]
        for solution in (found, expected)
    )
    error = (change - own).norm(dim=-1) / own.norm(dim=-1).clamp(min=1e-300)
    assert float(error.max()) < 1e-12
    found, expected = both_ways(solve_vectors, rule, gradients, accumulated, advantages, **options)
    check(found, expected, 1e-11)
    torch.testing.assert_close(found.removed_part, expected.removed_part, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 7, 16])
@pytest.mark.parametrize("kind", ["kernel", "norm"])
def test_transformed_advantages_agree(k: int, kind: Any) -> None:
    gradients = units(k)
    advantages = torch.randn(k, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gram = gradients @ gradients.mT
    found, expected = both_ways(precondition, kind, gram, advantages, regularization=1.0)
    check(found, expected, 1e-10)
    torch.testing.assert_close(found.coefficients, expected.coefficients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 7, 16])
def test_a_factor_has_the_rank_and_the_matrix(k: int) -> None:
    gradients = torch.nn.functional.normalize(units(k).nan_to_num(0, 0, 0), dim=-1)
    gram = gradients @ gradients.mT
    factor = pivoted_factor(gram, CUTOFF)
    torch.testing.assert_close(factor @ factor.mT, gram, rtol=0, atol=1e-13)
    values = torch.linalg.eigvalsh(gram)
    rank = (values > CUTOFF * values[:, -1:]).sum(dim=-1)
    assert torch.equal((factor != 0).any(dim=-2).sum(dim=-1), rank)
