"""Advantages relative to the other samples of a prompt.

A baseline that doesn't know the sample itself leaves the policy gradient unbiased; the group's mean
shrinks it by (n - 1) / n. Source: W. Kool et al., "Buy 4 REINFORCE samples, get a baseline for
free!", 2019.
"""

from __future__ import annotations

from collections.abc import Sequence

from proma_megatron.advantages.moments import EPSILON, centered, deviation


def leave_one_out(rewards: Sequence[float], normalize_std: bool) -> list[float]:
    """Subtract the mean of the others, and divide by their standard deviation if asked.

    Others that are all equal have no scale to divide by, and the difference stays as it is: over
    EPSILON alone, the one success of a group would be worth a million others. A single sample has
    nothing to be compared with, and advantage 0. The standard deviation is the population's.
    """
    return [
        _advantage(reward, [*rewards[:at], *rewards[at + 1 :]], normalize_std)
        for at, reward in enumerate(rewards)
    ]


def _advantage(reward: float, others: Sequence[float], normalize_std: bool) -> float:
    if not others:
        return 0.0
    # Relative to one of the others: equal rewards then cancel without rounding.
    advantage = (reward - others[0]) - sum(other - others[0] for other in others) / len(others)
    std = deviation(centered(others)) if normalize_std else 0.0
    return advantage / (std + EPSILON) if std > 0 else advantage
