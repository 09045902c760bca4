"""The function of each estimator; `config.choices` has what a configuration must know of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from proma_megatron.advantages.group import group_relative
from proma_megatron.advantages.leave_one_out import leave_one_out
from proma_megatron.advantages.reinforce_plus_plus import reinforce_plus_plus
from proma_megatron.advantages.rloo import rloo
from proma_megatron.advantages.stratified import stratified
from proma_megatron.config.objective import AdvantageConfig
from proma_megatron.types import RolloutGroup, ScoredRollout


@dataclass(frozen=True)
class Batch:
    """What advantages are estimated from: a whole batch, over all replicas."""

    groups: Sequence[RolloutGroup]
    rewards: Sequence[Sequence[float]]  # of each group's samples
    config: AdvantageConfig
    normalize_std: bool  # whether to divide by a standard deviation


Estimator = Callable[[Batch], list[list[float]]]  # one advantage a sample, by group


def _by_group(estimate: Callable[[Sequence[float], bool], list[float]]) -> Estimator:
    """Return the estimator that takes the rewards of one group after the other."""
    return lambda batch: [estimate(values, batch.normalize_std) for values in batch.rewards]


def _stratified(batch: Batch) -> list[list[float]]:
    return [
        stratified(
            values,
            [stratum(sample, batch.config.stratum) for sample in group.samples],
            batch.config.blend,
            batch.normalize_std,
        )
        for group, values in zip(batch.groups, batch.rewards, strict=True)
    ]


ESTIMATOR_FUNCTIONS: Mapping[str, Estimator] = {
    "group": _by_group(group_relative),
    "rloo": _by_group(lambda rewards, _: rloo(rewards)),
    "leave_one_out": _by_group(leave_one_out),
    "reinforce_plus_plus": lambda batch: reinforce_plus_plus(batch.rewards, batch.normalize_std),
    "stratified": _stratified,
}


def advantages(
    groups: Sequence[RolloutGroup],
    rewards: Sequence[Sequence[float]],
    config: AdvantageConfig,
    normalize_std: bool,
) -> list[list[float]]:
    """Return one advantage a sample, by group; exactly 0 where a group's rewards are equal.

    Args:
        groups: of the whole batch, over all replicas: reinforce_plus_plus takes its scale there.
        rewards: of each group's samples; apart, as a KL penalty may have changed them.
        config: which estimator; `config.sections.normalizes_std` says what its null stands for.
        normalize_std: whether to divide by a standard deviation. rloo never does.
    """
    for group, values in zip(groups, rewards, strict=True):
        if len(group.samples) != len(values):
            raise ValueError(f"a group of {len(group.samples)} samples has {len(values)} rewards")
    batch = Batch(groups, rewards, config, normalize_std)
    return ESTIMATOR_FUNCTIONS[config.estimator](batch)


def stratum(sample: ScoredRollout, key: str) -> Hashable:
    """Return the stratum of a sample, by the key ``advantage.stratum``.

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
