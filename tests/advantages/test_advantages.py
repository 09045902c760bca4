"""Advantages equal their formulas, and are 0 where nothing can be learned."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proma_megatron.advantages.group import group_relative
from proma_megatron.advantages.leave_one_out import leave_one_out
from proma_megatron.advantages.moments import EPSILON
from proma_megatron.advantages.registry import advantages, stratum
from proma_megatron.advantages.reinforce_plus_plus import reinforce_plus_plus
from proma_megatron.advantages.rloo import rloo
from proma_megatron.advantages.stratified import stratified
from proma_megatron.config.objective import AdvantageConfig
from proma_megatron.types import (
    Problem,
    Prompt,
    Rollout,
    RolloutGroup,
    ScoredRollout,
    zero_variance,
)

rewards_ = st.lists(st.floats(-4, 4), min_size=1, max_size=16)
groups_ = st.lists(st.lists(st.floats(-4, 4), min_size=2, max_size=6), min_size=1, max_size=5)
spread_ = rewards_.filter(lambda rewards: std(rewards) > 0.1)
Estimator = Callable[[Sequence[float]], list[float]]
PROMPT = Prompt(Problem("p", "q", "", "1"), "q", (1, 2))


def std(values: list[float]) -> float:
    return statistics.pstdev(values)


def scored(tokens: int = 3, finished: bool = True, timed_out: bool = False) -> ScoredRollout:
    rollout = Rollout(PROMPT, 0, (7,) * tokens, (-1.0,) * tokens, "", finished)
    return ScoredRollout(rollout, 0.0, 0.0, timed_out)


# Every estimator as a function of one group. Strata are halves of the group.
ESTIMATORS: dict[str, Estimator] = {
    "group": lambda r: group_relative(r, False),
    "group-std": lambda r: group_relative(r, True),
    "leave_one_out": lambda r: leave_one_out(r, False),
    "leave_one_out-std": lambda r: leave_one_out(r, True),
    "rloo": rloo,
    "reinforce_plus_plus": lambda r: reinforce_plus_plus([r, [0.0, 1.0]], False)[0],
    "reinforce_plus_plus-std": lambda r: reinforce_plus_plus([r, [0.0, 1.0]], True)[0],
    "stratified": lambda r: stratified(r, [at % 2 for at in range(len(r))], 0.7, False),
    "stratified-std": lambda r: stratified(r, [at % 2 for at in range(len(r))], 0.7, True),
}
each_estimator = pytest.mark.parametrize("name", ESTIMATORS)


@each_estimator
@given(reward=st.floats(-4, 4), count=st.integers(1, 16))
def test_equal_rewards_give_exactly_zero(name: str, reward: float, count: int) -> None:
    assert ESTIMATORS[name]([reward] * count) == [0.0] * count


@each_estimator
@given(rewards=st.lists(st.integers(-8, 8), min_size=1, max_size=9), shift=st.integers(-50, 50))
def test_a_shift_of_all_rewards_changes_nothing(name: str, rewards: list[int], shift: int) -> None:
    estimator = ESTIMATORS[name]
    shifted = estimator([float(reward + shift) for reward in rewards])
    assert shifted == pytest.approx(estimator([float(r) for r in rewards]), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "leave_one_out-std"])
@given(rewards=rewards_)
def test_advantages_of_a_group_sum_to_zero(name: str, rewards: list[float]) -> None:
    found = ESTIMATORS[name](rewards)
    assert len(found) == len(rewards)
    assert sum(found) == pytest.approx(0, abs=1e-8)


@each_estimator
def test_a_better_sample_has_the_greater_advantage(name: str) -> None:
    found = ESTIMATORS[name]([0.0, 0.1, 0.4, 0.5, 1.0, 1.1])
    assert found[0] < found[2] < found[4]  # one stratum
    assert found[0] < 0 < found[4]


# --------------------------------------------------------------------------- group


@given(rewards_)
def test_without_normalisation_differences_of_rewards_are_kept(rewards: list[float]) -> None:
    found = group_relative(rewards, normalize_std=False)
    for reward, advantage in zip(rewards, found, strict=True):
        assert advantage - found[0] == pytest.approx(reward - rewards[0], abs=1e-13)


@given(spread_, st.floats(0.5, 10))
def test_normalised_advantages_have_unit_deviation_at_any_scale_of_rewards(
    rewards: list[float], scale: float
) -> None:
    found = group_relative(rewards, normalize_std=True)
    assert std(found) == pytest.approx(1, abs=1e-4)
    scaled = group_relative([scale * reward for reward in rewards], normalize_std=True)
    assert scaled == pytest.approx(found, abs=1e-3)


def test_one_success_in_four() -> None:
    assert group_relative([0, 1, 0, 0], normalize_std=False) == [-0.25, 0.75, -0.25, -0.25]
    normalised = group_relative([0, 1, 0, 0], normalize_std=True)
    third = 3**-0.5
    assert normalised == pytest.approx([-third, 3 * third, -third, -third], abs=1e-5)


# --------------------------------------------------------------------------- leave one out


@given(
    st.lists(st.integers(-40, 40).map(lambda tenths: tenths / 10), min_size=1, max_size=9),
    st.booleans(),
)
def test_leave_one_out_equals_its_formula(rewards: list[float], normalize: bool) -> None:
    found = leave_one_out(rewards, normalize)
    for at, reward in enumerate(rewards):
        others = [other for index, other in enumerate(rewards) if index != at]
        if not others:
            assert found == [0.0]
            continue
        wanted = reward - sum(others) / len(others)
        if normalize and not zero_variance(others):
            wanted /= std(others) + EPSILON
        assert found[at] == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@given(rewards_.filter(lambda rewards: len(rewards) > 1))
def test_rloo_is_the_group_relative_advantage_scaled_up(rewards: list[float]) -> None:
    n = len(rewards)
    wanted = [n / (n - 1) * value for value in group_relative(rewards, normalize_std=False)]
    assert rloo(rewards) == pytest.approx(wanted, abs=1e-13)


def test_leave_one_out_of_one_success_in_four() -> None:
    third = 1 / 3
    assert rloo([0, 1, 0, 0]) == pytest.approx([-third, 1, -third, -third])
    # The others of the success are equal, and leave it as it is; those of a failure are 1, 0, 0.
    failure = -third / (2**0.5 / 3)
    found = leave_one_out([0, 1, 0, 0], normalize_std=True)
    assert found == pytest.approx([failure, 1, failure, failure], abs=1e-5)


def test_equal_others_are_told_from_a_small_deviation_whatever_rounds() -> None:
    """0.1 + 0.1 + 0.1 is not 0.3: a deviation of 1e-17 would make a million out of 0.9."""
    found = leave_one_out([1.0, 0.1, 0.1, 0.1], normalize_std=True)
    assert found[0] == pytest.approx(0.9)


# --------------------------------------------------------------------------- the whole batch


@given(groups_, st.booleans())
def test_reinforce_plus_plus_equals_its_formula(groups: list[list[float]], normalize: bool) -> None:
    """With the batch's mean subtracted, as the paper writes it."""
    centered = [[r - sum(group) / len(group) for r in group] for group in groups]
    flat = [value for group in centered for value in group]
    mean = sum(flat) / len(flat)
    scale = std(flat) + EPSILON if normalize else 1.0
    wanted = [[(value - mean) / scale for value in group] for group in centered]
    for have, want in zip(reinforce_plus_plus(groups, normalize), wanted, strict=True):
        assert have == pytest.approx(want, rel=1e-6, abs=1e-8)


def test_reinforce_plus_plus_has_one_scale_for_all_groups() -> None:
    found = reinforce_plus_plus([[0.0, 2.0], [0.3, 0.3, 0.3], [0.0, 0.2]], normalize_std=True)
    scale = ((2 * 1.0 + 2 * 0.01) / 7) ** 0.5 + EPSILON
    assert found[0] == pytest.approx([-1 / scale, 1 / scale])
    assert found[1] == [0.0, 0.0, 0.0]
    assert found[2] == pytest.approx([-0.1 / scale, 0.1 / scale])


@given(spread_, st.booleans())
def test_rounding_elsewhere_in_the_batch_gives_equal_rewards_no_advantage(
    rewards: list[float], normalize: bool
) -> None:
    assert reinforce_plus_plus([rewards, [0.3, 0.3, 0.3]], normalize)[1] == [0.0] * 3


# --------------------------------------------------------------------------- strata


@given(
    st.lists(st.tuples(st.floats(-4, 4), st.integers(0, 3)), min_size=1, max_size=12),
    st.floats(0, 1),
    st.booleans(),
)
def test_stratified_equals_its_formula(
    samples: list[tuple[float, int]], blend: float, normalize: bool
) -> None:
    rewards = [reward for reward, _ in samples]

    def relative(reward: float, peers: list[float]) -> float:
        value = reward - sum(peers) / len(peers)
        return value / (std(peers) + EPSILON) if normalize else value

    wanted = []
    for reward, key in samples:
        peers = [other for other, others_key in samples if others_key == key]
        wanted.append(blend * relative(reward, peers) + (1 - blend) * relative(reward, rewards))
    found = stratified(rewards, [key for _, key in samples], blend, normalize)
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-8)


def test_strata_by_hand() -> None:
    """Long samples score better; within a stratum that's no merit."""
    rewards, keys = [0.0, 1.0, 5.0, 7.0, 9.0], ["short", "short", "long", "long", "alone"]
    assert stratified(rewards, keys, 1.0, False) == [-0.5, 0.5, -1.0, 1.0, 0.0]
    assert stratified(rewards, keys, 0.0, False) == pytest.approx(group_relative(rewards, False))
    half = stratified(rewards, keys, 0.5, False)
    assert half == pytest.approx([-2.45, -1.45, -0.2, 1.8, 2.3])


def test_keys_of_strata() -> None:
    assert stratum(scored(finished=True), "finished") != stratum(scored(finished=False), "finished")
    late, punctual = scored(timed_out=True), scored(timed_out=False)
    assert stratum(late, "timed_out") != stratum(punctual, "timed_out")
    buckets = [stratum(scored(n), "length") for n in (1, 2, 3, 4, 7, 8, 15, 16)]
    assert [buckets.index(bucket) for bucket in buckets] == [0, 1, 1, 3, 3, 5, 5, 7]
    with pytest.raises(ValueError, match="unknown stratum 'colour'"):
        stratum(scored(), "colour")


# --------------------------------------------------------------------------- by configuration

REWARDS = [[0.0, 1.0, 0.0, 0.5], [0.25, 0.25, 0.25, 0.25]]


def groups_of(rewards: Sequence[Sequence[float]]) -> list[RolloutGroup]:
    """Rollouts of 3, 4, 5, ... tokens, every other one finished, the second timed out."""
    return [
        RolloutGroup(
            PROMPT, tuple(scored(3 + at, at % 2 == 0, at == 1) for at in range(len(group)))
        )
        for group in rewards
    ]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("config", "one"),
    [
        (AdvantageConfig(), group_relative),
        (AdvantageConfig(estimator="leave_one_out"), leave_one_out),
        (AdvantageConfig(estimator="rloo"), lambda r, _: rloo(r)),
        (
            AdvantageConfig(estimator="stratified", stratum="finished", blend=0.5),
            lambda r, n: stratified(r, [0, 1, 0, 1], 0.5, n),
        ),
        (
            AdvantageConfig(estimator="stratified", stratum="timed_out"),
            lambda r, n: stratified(r, [0, 1, 0, 0], 1.0, n),
        ),
        (
            AdvantageConfig(estimator="stratified", blend=0.25),
            lambda r, n: stratified(r, [0, 1, 1, 1], 0.25, n),
        ),
    ],
)
def test_the_configuration_chooses_the_estimator(
    config: AdvantageConfig, one: Callable[..., list[float]], normalize: bool
) -> None:
    found = advantages(groups_of(REWARDS), REWARDS, config, normalize)
    assert found == [one(rewards, normalize) for rewards in REWARDS]
    assert any(found[0])


@pytest.mark.parametrize("normalize", [False, True])
def test_reinforce_plus_plus_sees_the_batch(normalize: bool) -> None:
    config = AdvantageConfig(estimator="reinforce_plus_plus")
    found = advantages(groups_of(REWARDS), REWARDS, config, normalize)
    assert found == reinforce_plus_plus(REWARDS, normalize)


def test_rewards_are_those_given_and_not_those_of_the_samples() -> None:
    """Samples of these groups have reward 0 everywhere."""
    found = advantages(groups_of(REWARDS), REWARDS, AdvantageConfig(), False)
    assert found[0] == [-0.375, 0.625, -0.375, 0.125]


def test_rewards_that_do_not_fit_the_groups_are_refused() -> None:
    config = AdvantageConfig()
    with pytest.raises(ValueError, match="4 samples has 3 rewards"):
        advantages(groups_of(REWARDS), [REWARDS[0], [0.0, 0.0, 0.0]], config, False)
    with pytest.raises(ValueError, match="shorter"):
        advantages(groups_of(REWARDS), REWARDS[:1], config, False)


@given(rewards_)
def test_zero_variance_is_that_all_are_equal(rewards: list[float]) -> None:
    assert zero_variance(rewards) == (len(set(rewards)) == 1)
    assert zero_variance([rewards[0]] * 7)
