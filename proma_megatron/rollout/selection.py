"""Which groups a step trains on, where further ones were sampled for those that teach nothing.

Source: DAPO's dynamic sampling, arXiv:2503.14476, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

from proma_megatron.types import RolloutGroup, zero_variance


def informative(groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """Return the groups whose rewards are not all equal, in their order."""
    return [g for g in groups if not zero_variance([sample.reward for sample in g.samples])]


def choose(groups: Sequence[RolloutGroup], wanted: int) -> list[RolloutGroup]:
    """Return ``wanted`` groups in their order: informative ones and, if too few, others."""
    found = informative(groups)
    told = {id(group) for group in found}
    rest = [group for group in groups if id(group) not in told]
    chosen = {id(group) for group in [*found, *rest][:wanted]}
    return [group for group in groups if id(group) in chosen]
