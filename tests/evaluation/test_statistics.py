"""pass@k against enumeration, and intervals that hold what they promise."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proma_megatron.evaluation.statistics import accuracy_interval, mean_pass_at_k, pass_at_k


@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_correct_one(samples: int, data: object) -> None:
    assert isinstance(data, st.DataObject)
    correct = data.draw(st.integers(0, samples))
    k = data.draw(st.integers(1, samples))
    outcomes = [1] * correct + [0] * (samples - correct)
    draws = list(itertools.combinations(outcomes, k))
    assert pass_at_k(samples, correct, k) == pytest.approx(
        sum(max(draw) for draw in draws) / len(draws), abs=1e-12
    )


@pytest.mark.parametrize("k", [0, 5])
def test_a_k_beyond_the_samples_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k}"):
        pass_at_k(4, 2, k)


def test_pass_at_1_is_the_share_of_correct_completions() -> None:
    assert mean_pass_at_k([0, 2, 4], 4, 1) == pytest.approx(0.5)
    assert mean_pass_at_k([0, 2, 4], 4, 4) == pytest.approx(2 / 3)


def test_one_sample_gives_wilsons_interval() -> None:
    """Figures of 8 in 10, as tables of the score interval have them."""
    low, high = accuracy_interval([1] * 8 + [0] * 2, 1)
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)


@given(
    st.integers(1, 8).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n), min_size=1, max_size=40))
    )
)
def test_an_interval_holds_the_estimate_and_is_never_a_point(case: tuple[int, list[int]]) -> None:
    samples, correct = case
    low, high = accuracy_interval(correct, samples)
    p = sum(correct) / len(correct) / samples
    assert 0 <= low <= p <= high <= 1
    assert high - low > 1e-3


def test_samples_of_one_problem_are_no_independent_draws() -> None:
    """Problems that are solved always or never say as much with one sample as with many."""
    one = accuracy_interval([1] * 30 + [0] * 20, 1)
    many = accuracy_interval([16] * 30 + [0] * 20, 16)
    assert many == pytest.approx(one)
    evenly = accuracy_interval([10, 9, 10, 9, 10] * 10, 16)
    assert evenly[1] - evenly[0] < 0.5 * (one[1] - one[0])


@pytest.mark.parametrize(("samples", "problems"), [(1, 200), (8, 60)])
def test_the_interval_covers_the_truth_about_95_times_in_100(samples: int, problems: int) -> None:
    draw = random.Random(0)
    covered = 0
    for _ in range(600):
        # The truth: problems of very different difficulty, half right on average.
        chances = [draw.random() for _ in range(problems)]
        correct = [sum(draw.random() < p for _ in range(samples)) for p in chances]
        low, high = accuracy_interval(correct, samples)
        covered += low <= 0.5 <= high
    assert 0.92 < covered / 600 < 0.98
