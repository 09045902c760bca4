"""REINFORCE++ with baseline: a group's mean is taken out, the whole batch gives the scale.

Source: J. Hu et al., arXiv:2501.03262, the variant with a group baseline. A group of nearly equal
rewards isn't blown up to the size of others, as with the group's own deviation.

Chosen here: mean and deviation are over *sequences*, one value each, and not over tokens, which
would count long completions more often. The mean of the batch isn't subtracted again: rewards minus
their group's mean sum to 0 in every group, whatever its size, so it is 0 but for rounding, which
would give groups of equal rewards an advantage.
"""

from __future__ import annotations

from collections.abc import Sequence

from proma_megatron.advantages.moments import EPSILON, centered, deviation


def reinforce_plus_plus(
    rewards: Sequence[Sequence[float]], normalize_std: bool
) -> list[list[float]]:
    """Subtract the group's mean, and divide by the deviation of these in the batch if asked.

    Args:
        rewards: of each group of the whole batch, over all replicas.
    """
    groups = [centered(group) for group in rewards]
    values = [value for group in groups for value in group]
    if not normalize_std or not values:
        return groups
    std = deviation(values)
    return [[value / (std + EPSILON) for value in group] for group in groups]
