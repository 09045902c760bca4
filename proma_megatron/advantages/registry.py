"""The advantages of a batch, by the estimator that the configuration names."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from proma_megatron.advantages.group import group_relative
from proma_megatron.advantages.leave_one_out import leave_one_out
from proma_megatron.advantages.reinforce_plus_plus import reinforce_plus_plus
from proma_megatron.advantages.rloo import rloo
from proma_megatron.advantages.stratified import stratified
from proma_megatron.config.objective import AdvantageConfig
from proma_megatron.types import RolloutGroup, ScoredRollout


def advantages(
    groups: Sequence[RolloutGroup],
    rewards: Sequence[Sequence[float]],
    config: AdvantageConfig,
    normalize_std: bool,
) -> list[list[float]]:
    """One advantage a sample, by group. Equal rewards of a group are exactly 0 in all of them.

    Args:
        groups: of the whole batch, over all replicas: reinforce_plus_plus takes its scale there.
        rewards: of each group's samples; apart, as a KL penalty may have changed them.
        config: which estimator; `algorithms.normalizes_std` says what its null stands for.
        normalize_std: whether to divide by a standard deviation. rloo never does.
    """
    for group, values in zip(groups, rewards, strict=True):
        if len(group.samples) != len(values):
            raise ValueError(f"a group of {len(group.samples)} samples has {len(values)} rewards")
    if config.estimator == "group":
        return [group_relative(values, normalize_std) for values in rewards]
    if config.estimator == "leave_one_out":
        return [leave_one_out(values, normalize_std) for values in rewards]
    if config.estimator == "rloo":
        return [rloo(values) for values in rewards]
    if config.estimator == "reinforce_plus_plus":
        return reinforce_plus_plus(rewards, normalize_std)
    return [
        stratified(
            values,
            [stratum(sample, config.stratum) for sample in group.samples],
            config.blend,
            normalize_std,
        )
        for group, values in zip(groups, rewards, strict=True)
    ]


def stratum(sample: ScoredRollout, key: str) -> Hashable:
    """The stratum of a sample, by the key ``advantage.stratum``.

    "finished" and "timed_out" are two strata each; "length" has one for each power of two of
    completion tokens: 1, 2 to 3, 4 to 7, ...
    """
    if key == "finished":
        return sample.rollout.finished
    if key == "timed_out":
        return sample.timed_out
    if key == "length":
        return len(sample.rollout.tokens).bit_length()
    raise ValueError(f"unknown stratum {key!r}")
