"""Earlier weights of the policy, kept in host memory, that can stand in for the current ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from proma_megatron.model.policy import Policy


class WeightSnapshot:
    """A copy of this rank's weights."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._saved = _copies(policy)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the policy these weights within the ``with`` block, and its own again after it."""
        with _stand_in(self.policy, self._saved):
            yield


class LaggedMean:
    """The mean of the policy's weights over the last ``steps`` updates.

    Of fewer than ``steps`` weights it is their plain mean. After that each new one counts
    1 / steps and the older ones fade, so that one copy is enough. It is kept in float32 or better;
    in place, it has the policy's dtype.
    """

    def __init__(self, policy: Policy, steps: int) -> None:
        self.policy, self.steps = policy, steps
        self.count = 0
        self._mean: list[torch.Tensor] = []

    def add(self) -> None:
        """Take in the policy's current weights."""
        self.count = min(self.count + 1, self.steps)
        current = _copies(self.policy)
        if not self._mean:
            self._mean = _precise(current)
            return
        for mean, weight in zip(self._mean, current, strict=True):
            mean += (weight.to(mean.dtype) - mean) / self.count

    @property
    def weights(self) -> list[torch.Tensor]:
        """The mean, a tensor for each of the policy's shards; empty before the first `add`."""
        return self._mean

    def allocate(self) -> list[torch.Tensor]:
        """Make room for a mean that is read from a checkpoint, as `weights`."""
        self._mean = [torch.zeros_like(w) for w in _precise(_copies(self.policy))]
        return self._mean

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the policy the mean weights within the ``with`` block, and its own after it."""
        with _stand_in(self.policy, self._mean):
            yield


def _copies(policy: Policy) -> list[torch.Tensor]:
    return [shard.parameter.detach().to("cpu", copy=True) for shard in policy.shards]


def _precise(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    return [w if w.dtype == torch.float64 else w.float() for w in weights]


@contextmanager
def _stand_in(policy: Policy, weights: list[torch.Tensor]) -> Iterator[None]:
    own = _copies(policy)
    _fill(policy, weights)
    try:
        yield
    finally:
        _fill(policy, own)


@torch.no_grad()
def _fill(policy: Policy, weights: list[torch.Tensor]) -> None:
    for shard, weight in zip(policy.shards, weights, strict=True):
        shard.parameter.copy_(weight)
