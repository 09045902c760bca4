"""Both forms of the rules against the paper's own, on vectors of dimension d."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paper import complement, project_to_complement

from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.projection.rules.proma import Outcome, solve, solve_vectors

RULES = ["exact", "iterative", "ridge"]
SHRINKAGES = [1.0, 0.5, 0.0]
BOUNDS = [None, 0.5, 1e-9]
TOLERANCE = 1e-9  # relative; spans are well conditioned, up to exact dependence
CUTOFF = 1e-11


@dataclass(frozen=True)
class Problem:
    """One unit at one microbatch."""

    accumulated: torch.Tensor  # A (d,)
    gradients: torch.Tensor  # G (d, k)
    advantages: torch.Tensor  # a (k,)
    vectors: bool = False  # solved from G itself, as norms and biases are, not from K and c

    @property
    def policy(self) -> torch.Tensor:
        return self.gradients @ self.advantages

    def _solve(
        self, rule: str, shrinkage: float, bound: float | None
    ) -> tuple[torch.Tensor, Outcome]:
        options: Any = {"shrinkage": shrinkage, "bound": bound, "cutoff": CUTOFF}
        if self.vectors:
            found = solve_vectors(
                rule,  # type: ignore[arg-type]
                self.gradients.T,
                self.accumulated,
                self.advantages,
                **options,
            )
            return found.removed_part, found
        solution = solve(
            rule,  # type: ignore[arg-type]
            self.gradients.T @ self.gradients,
            self.gradients.T @ self.accumulated,
            self.advantages,
            **options,
        )
        return self.gradients @ (self.advantages - solution.coefficients), solution

    def solve(self, rule: str, shrinkage: float = 1.0, bound: float | None = None) -> Outcome:
        return self._solve(rule, shrinkage, bound)[1]

    def removed(
        self, rule: str, shrinkage: float = 1.0, bound: float | None = None
    ) -> torch.Tensor:
        """(d,) what is taken out of A."""
        return self._solve(rule, shrinkage, bound)[0]

    def assert_close(self, value: torch.Tensor, expected: torch.Tensor) -> None:
        size = self.accumulated.norm() + self.policy.norm()
        assert (value - expected).norm() <= TOLERANCE * size


@st.composite
def problems(draw: st.DrawFn, silent: bool = False) -> Problem:
    """Spans of any rank: zero sequences, copies and combinations beside independent ones.

    ``silent`` sets all advantages to 0, so that coefficients are those of the removed part alone.
    """
    d = draw(st.integers(1, 40), label="d")
    k = draw(st.integers(1, 8), label="k")
    rank = draw(st.integers(0, min(d, k)), label="rank")
    kinds = ["zero"] if rank == 0 else ["zero", "copy", "combination"]
    rest = draw(st.lists(st.sampled_from(kinds), min_size=k - rank, max_size=k - rank))
    scales = draw(st.lists(st.integers(-3, 3), min_size=k, max_size=k), label="scales")
    muted = draw(st.lists(st.booleans(), min_size=k, max_size=k), label="advantage 0")
    size = draw(st.integers(-3, 3), label="size of A")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32), label="seed"))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    left, _ = torch.linalg.qr(normal(d, rank))
    right, _ = torch.linalg.qr(normal(rank, rank))
    spread = 0.3 + torch.rand(rank, generator=generator, dtype=torch.float64)
    independent = left @ torch.diag(spread) @ right
    columns = list(independent.T)
    for kind in rest:
        if kind == "zero":
            columns.append(torch.zeros(d, dtype=torch.float64))
        elif kind == "copy":
            columns.append(independent[:, 0])
        else:
            columns.append(independent @ normal(rank))
    order = torch.randperm(k, generator=generator)
    gradients = torch.stack(columns, dim=1)[:, order] * 10.0 ** torch.tensor(scales).double()
    advantages = normal(k) * (0.0 if silent else 1.0)
    advantages[torch.tensor(muted)] = 0.0
    vectors = draw(st.booleans(), label="from G itself")
    return Problem(normal(d) * 10.0**size, gradients, advantages, vectors)


@pytest.mark.parametrize("shrinkage", SHRINKAGES)
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=40)
@given(problem=problems())
def test_the_update_is_the_papers(
    rule: str, bound: float | None, shrinkage: float, problem: Problem
) -> None:
    config = ProjectionConfig(rule=rule, bound=bound, shrinkage=shrinkage)  # type: ignore[arg-type]
    expected = (
        complement(problem.accumulated, problem.gradients, problem.policy, config) + problem.policy
    )
    removed = problem.removed(rule, shrinkage, bound)
    problem.assert_close(problem.accumulated - removed + problem.policy, expected)


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=100)
@given(problem=problems(silent=True))
def test_without_advantages_the_update_is_the_papers_projection(
    rule: str, problem: Problem
) -> None:
    expected = project_to_complement(rule, problem.accumulated, problem.gradients)
    problem.assert_close(problem.accumulated - problem.removed(rule), expected)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), k=st.integers(1, 6))
def test_exact_is_figure_3s_qr_on_independent_sequences(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn((60, k), generator=generator, dtype=torch.float64)
    accumulated = torch.randn(60, generator=generator, dtype=torch.float64)
    basis, _ = torch.linalg.qr(gradients, mode="reduced")
    for vectors in (False, True):
        problem = Problem(accumulated, gradients, torch.zeros(k, dtype=torch.float64), vectors)
        problem.assert_close(problem.removed("exact"), basis @ (basis.T @ accumulated))


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=50)
@given(problem=problems())
def test_reported_norms_are_those_of_the_vectors(rule: str, problem: Problem) -> None:
    bound, shrinkage = 0.5, 0.75
    solution = problem.solve(rule, shrinkage, bound)
    unbounded = problem.accumulated - project_to_complement(
        rule, problem.accumulated, problem.gradients
    )
    limit = bound * problem.policy.norm()
    size = problem.accumulated.norm()
    removed = shrinkage * torch.minimum(unbounded.norm(), limit)
    assert abs(solution.policy.sqrt() - problem.policy.norm()) <= 1e-7 * problem.policy.norm()
    assert abs(solution.removed.sqrt() - removed) <= 1e-7 * size
    if abs(unbounded.norm() - limit) > 1e-6 * size:
        assert bool(solution.clamped) == bool(unbounded.norm() > limit)


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=50)
@given(problem=problems(silent=True))
def test_residual_is_the_largest_overlap_that_is_left(rule: str, problem: Problem) -> None:
    rest = problem.accumulated - problem.removed(rule)
    norms = problem.gradients.norm(dim=0)
    overlaps = (problem.gradients.T @ rest / norms.clamp(min=1e-300)).abs()
    expected = overlaps[norms > 0].max() if (norms > 0).any() else torch.tensor(0.0)
    assert abs(problem.solve(rule).residual - expected) <= TOLERANCE * problem.accumulated.norm()


@settings(deadline=None, max_examples=100)
@given(problem=problems(silent=True))
def test_after_exact_nothing_is_left_along_any_sequence(problem: Problem) -> None:
    rest = problem.accumulated - problem.removed("exact")
    overlaps = problem.gradients.T @ rest
    limit = TOLERANCE * problem.gradients.norm(dim=0) * problem.accumulated.norm()
    assert (overlaps.abs() <= limit).all()
    assert problem.solve("exact").residual <= TOLERANCE * problem.accumulated.norm()


@settings(deadline=None, max_examples=100)
@given(problem=problems(silent=True))
def test_projecting_twice_is_projecting_once(problem: Problem) -> None:
    once = problem.accumulated - problem.removed("exact")
    again = dataclasses.replace(problem, accumulated=once)
    problem.assert_close(once - again.removed("exact"), once)


@settings(deadline=None, max_examples=100)
@given(problem=problems(), data=st.data())
def test_the_order_of_sequences_does_not_matter(problem: Problem, data: st.DataObject) -> None:
    order = torch.tensor(data.draw(st.permutations(range(problem.gradients.shape[1]))))
    shuffled = dataclasses.replace(
        problem, gradients=problem.gradients[:, order], advantages=problem.advantages[order]
    )
    problem.assert_close(shuffled.removed("exact", 1.0, 0.5), problem.removed("exact", 1.0, 0.5))


@settings(deadline=None, max_examples=100)
@given(problem=problems(silent=True), data=st.data())
def test_the_length_of_a_sequences_gradient_does_not_matter(
    problem: Problem, data: st.DataObject
) -> None:
    which = data.draw(st.integers(0, problem.gradients.shape[1] - 1))
    factor = data.draw(st.sampled_from([-1e3, -1.0, 1e-3, 7.0, 1e3]))
    gradients = problem.gradients.clone()
    gradients[:, which] *= factor
    scaled = dataclasses.replace(problem, gradients=gradients)
    problem.assert_close(scaled.removed("exact"), problem.removed("exact"))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bound", [0.5, 1e-9, 0.0])
@settings(deadline=None, max_examples=50)
@given(problem=problems())
def test_the_removed_part_stays_within_the_bound(rule: str, bound: float, problem: Problem) -> None:
    removed = problem.removed(rule, bound=bound)
    # P itself is rounded where sequences cancel.
    slack = 1e-12 * (problem.gradients.norm(dim=0) * problem.advantages.abs()).sum()
    slack = slack + 1e-7 * bound * problem.policy.norm()
    assert removed.norm() <= bound * problem.policy.norm() + slack


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=100)
@given(problem=problems())
def test_the_form_in_k_and_c_is_the_form_in_vectors(rule: str, problem: Problem) -> None:
    other = dataclasses.replace(problem, vectors=not problem.vectors)
    problem.assert_close(other.removed(rule, 0.75, 0.5), problem.removed(rule, 0.75, 0.5))


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_removed_within_a_bound_on_nothing(rule: str, vectors: bool) -> None:
    """Nearly equal sequences whose advantages sum to 0: P is rounding, and so is its bound."""
    generator = torch.Generator().manual_seed(4)
    one = torch.randn((40, 1), generator=generator, dtype=torch.float64)
    noise = 1 + 1e-15 * torch.randn((40, 4), generator=generator, dtype=torch.float64)
    advantages = torch.tensor([0.3, -0.7, 0.6, -0.2], dtype=torch.float64)
    accumulated = torch.randn(40, generator=generator, dtype=torch.float64)
    problem = Problem(accumulated, one * noise, advantages, vectors)
    assert problem.removed(rule, 1.0, 0.5).norm() < 1e-14 * one.norm()


@pytest.mark.parametrize("smallest", [1e-2, 1e-3, 1e-4, 1e-5])
def test_nearly_dependent_vectors_keep_their_digits(smallest: float) -> None:
    """Where K has lost them: its condition number is G's squared."""
    generator = torch.Generator().manual_seed(5)
    left, _ = torch.linalg.qr(torch.randn(9, 8, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))
    sizes = torch.logspace(0, math.log10(smallest), 8, dtype=torch.float64)
    accumulated = torch.randn(9, generator=generator, dtype=torch.float64)
    problem = Problem(accumulated, left @ torch.diag(sizes) @ right, torch.zeros(8).double(), True)
    expected = left @ (left.T @ accumulated)
    error = (problem.removed("exact") - expected).norm() / accumulated.norm()
    assert error < 1e-15 / smallest
    squared = dataclasses.replace(problem, vectors=False)
    lost = (squared.removed("exact") - expected).norm() / accumulated.norm()
    assert lost < 1e-15 / smallest**2


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=30)
@given(problem=problems(), seed=st.integers(0, 2**32))
def test_units_solved_together_are_solved_as_if_alone(
    rule: str, problem: Problem, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    other = torch.randn(problem.gradients.shape, generator=generator, dtype=torch.float64)
    silent = torch.zeros_like(other)
    alone = [
        dataclasses.replace(problem, gradients=gradients, vectors=False)
        for gradients in (problem.gradients, other, silent)
    ]
    vectors = solve_vectors(
        rule,  # type: ignore[arg-type]
        torch.stack([p.gradients.T for p in alone]),
        problem.accumulated.expand(len(alone), -1),
        problem.advantages,
        shrinkage=0.5,
        bound=0.5,
        cutoff=CUTOFF,
    )
    together = solve(
        rule,  # type: ignore[arg-type]
        torch.stack([p.gradients.T @ p.gradients for p in alone]),
        torch.stack([p.gradients.T @ p.accumulated for p in alone]),
        problem.advantages,
        shrinkage=0.5,
        bound=0.5,
        cutoff=CUTOFF,
    )
    for at, single in enumerate(alone):
        solution = single.solve(rule, 0.5, 0.5)
        lost = problem.advantages - together.coefficients[at]
        single.assert_close(single.gradients @ lost, single.removed(rule, 0.5, 0.5))
        assert together.clamped[at] == solution.clamped
        single.assert_close(vectors.removed_part[at], single.removed(rule, 0.5, 0.5))


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_a_microbatch_of_silent_sequences_removes_nothing(rule: str, vectors: bool) -> None:
    zeros = torch.zeros((5, 3), dtype=torch.float64)
    advantages = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    problem = Problem(torch.ones(5).double(), zeros, advantages, vectors)
    solution = problem.solve(rule, 1.0, 0.5)
    assert not problem.removed(rule, 1.0, 0.5).any()
    assert solution.removed == 0
    assert solution.residual == 0
    assert not solution.clamped


def test_a_sequence_counts_once_however_often_it_is_given() -> None:
    generator = torch.Generator().manual_seed(3)
    one = torch.randn((12, 1), generator=generator, dtype=torch.float64)
    accumulated = torch.randn(12, generator=generator, dtype=torch.float64)
    single = Problem(accumulated, one, torch.zeros(1).double()).removed("exact")
    for vectors in (False, True):
        copies = Problem(accumulated, one.repeat(1, 6), torch.zeros(6).double(), vectors)
        torch.testing.assert_close(copies.removed("exact"), single, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("where", ["gradients", "accumulated"])
def test_a_unit_that_is_not_finite_is_left_alone(
    rule: Any, bad: float, vectors: bool, where: str
) -> None:
    """1e200 is finite, but its square is not."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn((2, 3, 7), generator=generator, dtype=torch.float64)
    accumulated = torch.randn((2, 7), generator=generator, dtype=torch.float64)
    (gradients if where == "gradients" else accumulated)[0, ..., 2] = bad
    advantages = torch.randn(3, generator=generator, dtype=torch.float64)

    def solved(units: slice) -> tuple[Outcome, torch.Tensor]:
        options: Any = {"shrinkage": 1.0, "bound": 0.5, "cutoff": CUTOFF}
        g, a = gradients[units], accumulated[units]
        if vectors:
            found = solve_vectors(rule, g, a, advantages, **options)
            return found, found.removed_part
        overlap = (g @ a[..., None])[..., 0]
        solution = solve(rule, g @ g.mT, overlap, advantages, **options)
        return solution, advantages - solution.coefficients

    found, removed = solved(slice(2))
    assert found.finite.tolist() == [False, True]
    assert not removed[0].any()
    alone, expected = solved(slice(1, 2))
    assert bool(alone.finite)
    assert torch.equal(removed[1], expected[0])
