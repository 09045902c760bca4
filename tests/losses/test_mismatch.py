"""Truncated importance weights between the trainer's and the generator's log-probabilities."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proma_megatron.losses.mismatch import truncated_weights

logprob = st.floats(-20, 0)
pairs_ = st.lists(st.tuples(logprob, logprob), max_size=9)


@given(pairs_, st.floats(0.5, 5))
def test_each_token_has_its_own_ratio_up_to_the_cap(
    pairs: list[tuple[float, float]], cap: float
) -> None:
    found = truncated_weights([t for t, _ in pairs], [g for _, g in pairs], "token", cap)
    wanted = [min(math.exp(t) / math.exp(g), cap) for t, g in pairs]
    assert found == pytest.approx(wanted, rel=1e-12)
    assert all(weight <= cap for weight in found)


@given(pairs_, st.floats(0.5, 5))
def test_tokens_of_a_sequence_share_its_ratio_up_to_the_cap(
    pairs: list[tuple[float, float]], cap: float
) -> None:
    found = truncated_weights([t for t, _ in pairs], [g for _, g in pairs], "sequence", cap)
    ratio = 1.0
    for t, g in pairs:
        ratio *= math.exp(t - g)
    assert found == pytest.approx([min(ratio, cap)] * len(pairs), rel=1e-10, abs=1e-30)


def test_by_hand() -> None:
    trainer, generator = [math.log(0.6), math.log(0.1)], [math.log(0.2), math.log(0.4)]
    assert truncated_weights(trainer, generator, "token", 2.0) == pytest.approx((2.0, 0.25))
    assert truncated_weights(trainer, generator, "sequence", 2.0) == pytest.approx((0.75, 0.75))
    assert truncated_weights(trainer, generator, "sequence", 0.5) == (0.5, 0.5)


@pytest.mark.parametrize("mode", ["token", "sequence"])
def test_programs_that_agree_have_weight_exactly_one(mode: str) -> None:
    assert truncated_weights([-0.3, -9.0], [-0.3, -9.0], mode, 2.0) == (1.0, 1.0)


def test_a_long_sequence_neither_overflows_nor_fails() -> None:
    zeros, low = [0.0] * 2000, [-5.0] * 2000
    assert set(truncated_weights(zeros, low, "sequence", 3.0)) == {3.0}
    assert set(truncated_weights(low, zeros, "sequence", 3.0)) == {0.0}


def test_unknown_mode_and_uneven_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown mismatch mode 'off'"):
        truncated_weights([0.0], [0.0], "off", 2.0)
    with pytest.raises(ValueError, match="shorter"):
        truncated_weights([0.0, 0.0], [0.0], "token", 2.0)
