"""Advantages relative to the group: the mean of all samples of a prompt is the baseline."""

from __future__ import annotations

from collections.abc import Sequence

from proma_megatron.advantages.moments import EPSILON, centered, deviation


def group_relative(rewards: Sequence[float], normalize_std: bool) -> list[float]:
    """Subtract the group's mean, and divide by the group's standard deviation if asked.

    GRPO (arXiv:2402.03300, section 4.1.2) divides; Dr. GRPO (arXiv:2503.20783) does not. The
    standard deviation is the population's.
    """
    values = centered(rewards)
    if not normalize_std:
        return values
    std = deviation(values)
    return [value / (std + EPSILON) for value in values]
