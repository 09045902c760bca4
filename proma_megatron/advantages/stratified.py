"""Stratified advantages: samples of a prompt are compared with those of their own kind.

Source: Stratified GRPO, arXiv:2510.06214: stratified advantage normalization and its blend with the
global one. There, a stratum is the number of searches in a rollout.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from proma_megatron.advantages.group import group_relative


def stratified(
    rewards: Sequence[float], keys: Sequence[Hashable], blend: float, normalize_std: bool
) -> list[float]:
    """Return ``blend`` times the advantages within strata, plus the rest of those within the group.

    Both are group-relative: minus a mean, over the same samples' standard deviation if asked. A
    sample that is alone in its stratum has advantage 0 there.

    Args:
        rewards: of one group's samples.
        keys: of the same samples; equal keys are one stratum.
        blend: in [0, 1].
    """
    strata: dict[Hashable, list[int]] = {}
    for at, (_, key) in enumerate(zip(rewards, keys, strict=True)):
        strata.setdefault(key, []).append(at)
    within = [0.0] * len(rewards)
    for members in strata.values():
        found = group_relative([rewards[at] for at in members], normalize_std)
        for at, advantage in zip(members, found, strict=True):
            within[at] = advantage
    overall = group_relative(rewards, normalize_std)
    return [blend * mine + (1 - blend) * all_ for mine, all_ in zip(within, overall, strict=True)]
