"""ISOPO's advantages against the formulas on vectors of dimension d."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paper import isopo_advantages

from proma_megatron.projection.rules.isopo import Kind, precondition

KINDS: list[Kind] = ["kernel", "norm"]
many = settings(deadline=None, max_examples=30)
problems = st.tuples(
    st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 7), st.integers(0, 7)
)


def made(problem: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """G (d, k) of any rank and scale, with silent sequences, and a (k,)."""
    seed, d, k, rank = problem
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(shape, generator=generator).double() for shape in ((d, rank), (rank, k))]
    scale = 10.0 ** torch.randint(-3, 4, (k,), generator=generator).double()
    scale[torch.rand(k, generator=generator) < 0.2] = 0
    return factors[0] @ factors[1] * scale, torch.randn(k, generator=generator).double()


@pytest.mark.parametrize("kind", KINDS)
@many
@given(problem=problems, regularization=st.sampled_from([1e-3, 0.3, 1.0, 50.0]))
def test_the_update_and_its_figures_are_those_of_the_vectors(
    kind: Kind, problem: tuple[int, int, int, int], regularization: float
) -> None:
    gradients, advantages = made(problem)
    found = precondition(kind, gradients.T @ gradients, advantages, regularization=regularization)
    expected = isopo_advantages(kind, gradients, advantages, regularization)
    torch.testing.assert_close(found.coefficients, expected, rtol=1e-9, atol=1e-9)
    plain = gradients @ advantages
    size = (gradients.norm(dim=0) * advantages.abs()).sum()
    assert abs(found.policy.sqrt() - plain.norm()) <= 1e-7 * size
    changed = (plain - gradients @ expected).norm()
    assert abs(found.removed.sqrt() - changed) <= 1e-7 * size
    assert not found.clamped
    assert found.residual == 0


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_advantages_stay(kind: Kind) -> None:
    advantages = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    found = precondition(kind, torch.zeros(3, 3).double(), advantages, regularization=1.0)
    assert torch.equal(found.coefficients, advantages)
    assert found.removed == found.policy == 0


@pytest.mark.parametrize("kind", KINDS)
def test_units_solved_together_are_solved_as_if_alone(kind: Kind) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn((4, 20, 5), generator=generator, dtype=torch.float64)
    gradients[2] = 0
    advantages = torch.randn(5, generator=generator, dtype=torch.float64)
    together = precondition(kind, gradients.mT @ gradients, advantages, regularization=0.5)
    for at, alone in enumerate(gradients):
        expected = isopo_advantages(kind, alone, advantages, 0.5)
        torch.testing.assert_close(together.coefficients[at], expected, rtol=1e-12, atol=1e-12)


def test_a_weak_norm_regularization_gives_equal_lengths() -> None:
    """a'_s |G_s| -> sqrt(reg) a_s."""
    gradients = torch.diag(torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64))
    advantages = torch.ones(3, dtype=torch.float64)
    gram, weak = gradients.square(), 1e-10
    found = precondition("norm", gram, advantages, regularization=weak).coefficients
    expected = (weak * gram.trace() / 3).sqrt() / gradients.diagonal()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_a_strong_regularization_changes_nothing() -> None:
    gradients, advantages = made((3, 10, 4, 4))
    for kind in KINDS:
        found = precondition(kind, gradients.T @ gradients, advantages, regularization=1e12)
        torch.testing.assert_close(found.coefficients, advantages, rtol=1e-9, atol=1e-9)


def test_sequences_that_agree_are_damped_more_than_one_that_differs() -> None:
    """What "interacting" means: copies of a sequence share one length."""
    gradients = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    advantages = torch.ones(4, dtype=torch.float64)
    gram = gradients.T @ gradients
    kernel = precondition("kernel", gram, advantages, regularization=1.0).coefficients
    norm = precondition("norm", gram, advantages, regularization=1.0).coefficients
    assert kernel.tolist() == pytest.approx([0.25, 0.25, 0.25, 0.5])
    assert norm.tolist() == pytest.approx([0.5**0.5] * 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e308])
def test_a_unit_that_is_not_finite_keeps_its_advantages(kind: Kind, bad: float) -> None:
    gradients, _ = made((2, 10, 4, 4))
    good, advantages = gradients.T @ gradients, torch.full((4,), 3.0).double()
    poisoned = good.clone()
    poisoned[1, 1] = bad  # 1e308 is finite, but what is computed from it is not
    found = precondition(kind, torch.stack([poisoned, good]), advantages, regularization=1.0)
    assert found.finite.tolist() == [False, True]
    assert torch.equal(found.coefficients[0], advantages)
    alone = precondition(kind, good, advantages, regularization=1.0)
    assert torch.equal(found.coefficients[1], alone.coefficients)
