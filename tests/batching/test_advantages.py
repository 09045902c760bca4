"""Group-relative advantages are centered, scaled when asked, and 0 where nothing can be learned."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proma_megatron.batching.advantages import group_relative

rewards_ = st.lists(st.floats(-4, 4), min_size=1, max_size=16)


def std(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5


@given(rewards_, st.booleans())
def test_advantages_of_a_group_sum_to_zero(rewards: list[float], normalize: bool) -> None:
    advantages = group_relative(rewards, normalize)
    assert len(advantages) == len(rewards)
    assert sum(advantages) == pytest.approx(0, abs=1e-8)


@given(rewards_)
def test_without_normalisation_differences_of_rewards_are_kept(rewards: list[float]) -> None:
    advantages = group_relative(rewards, normalize_std=False)
    for reward, advantage in zip(rewards, advantages, strict=True):
        assert advantage - advantages[0] == pytest.approx(reward - rewards[0], abs=1e-13)


@given(rewards_.filter(lambda rewards: std(rewards) > 0.1), st.floats(0.5, 10))
def test_normalised_advantages_have_unit_deviation_at_any_scale_of_rewards(
    rewards: list[float], scale: float
) -> None:
    advantages = group_relative(rewards, normalize_std=True)
    assert std(advantages) == pytest.approx(1, abs=1e-4)
    scaled = group_relative([scale * reward for reward in rewards], normalize_std=True)
    assert scaled == pytest.approx(advantages, abs=1e-3)


def test_one_success_in_four() -> None:
    assert group_relative([0, 1, 0, 0], normalize_std=False) == [-0.25, 0.75, -0.25, -0.25]
    normalised = group_relative([0, 1, 0, 0], normalize_std=True)
    third = 3**-0.5
    assert normalised == pytest.approx([-third, 3 * third, -third, -third], abs=1e-5)


@given(st.floats(-4, 4), st.integers(1, 16), st.booleans())
def test_equal_rewards_give_exactly_zero(reward: float, count: int, normalize: bool) -> None:
    assert group_relative([reward] * count, normalize) == [0.0] * count
