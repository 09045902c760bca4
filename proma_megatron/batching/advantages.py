"""Group-relative advantages."""

from __future__ import annotations

from collections.abc import Sequence

EPSILON = 1e-6  # keeps a group of equal rewards at advantage 0


def group_relative(rewards: Sequence[float], normalize_std: bool) -> list[float]:
    """Each reward minus the mean of its group, over the group's standard deviation if asked.

    GRPO (arXiv:2402.03300, section 4.1.2) divides; Dr. GRPO (arXiv:2503.20783) does not. The
    standard deviation is the population's.
    """
    # Relative to the first, so that rounding of the mean can't tell equal rewards apart.
    shifted = [reward - rewards[0] for reward in rewards]
    mean = sum(shifted) / len(shifted)
    centered = [value - mean for value in shifted]
    if not normalize_std:
        return centered
    std = (sum(value * value for value in centered) / len(centered)) ** 0.5
    return [value / (std + EPSILON) for value in centered]
