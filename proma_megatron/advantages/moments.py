"""Mean and standard deviation of a few rewards, exact where they are all equal."""

from __future__ import annotations

from collections.abc import Sequence

EPSILON = 1e-6  # keeps rewards that are all equal at advantage 0


def centered(rewards: Sequence[float]) -> list[float]:
    """Subtract the mean; exactly 0 where all are equal."""
    # Relative to the first, so that rounding of the mean can't tell equal rewards apart.
    shifted = [reward - rewards[0] for reward in rewards]
    mean = sum(shifted) / len(shifted)
    return [value - mean for value in shifted]


def deviation(values: Sequence[float]) -> float:
    """Return the standard deviation, the population's, of centered values."""
    return (sum(value * value for value in values) / len(values)) ** 0.5
