"""One minibatch through the schedule: its plan, its passes, and the gradients that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from proma_megatron.batching.packing import (
    pack,
)
from proma_megatron.learner.schedule import Sums, forward_backward
from proma_megatron.losses.options import LossOptions
from proma_megatron.model.policy import Policy
from proma_megatron.projection.accumulator import Accumulator
from proma_megatron.types import Microbatch, TrainingSequence

What = Literal["loss", "gradient", "projection"]


@dataclass(frozen=True)
class MinibatchPass:
    """How one minibatch goes through the schedule on this rank."""

    policy: Policy
    microbatches: Sequence[Microbatch]
    options: LossOptions
    accumulator: Accumulator | None
    temperature: float

    def run(self) -> Sums:
        """Compute gradients in ``main_grad``, reduced; return sums of this replica."""
        return self._accumulate(self.microbatches, reduce=True)

    def fails(self, first: int, stop: int) -> What | None:
        """Find what of a part of the chain is not finite by itself; the same on the whole replica.

        Overwrites ``main_grad``. Replicas don't wait for each other.
        """
        chain = [
            replace(microbatch, index=index)
            for index, microbatch in enumerate(self.microbatches[first:stop])
        ]
        topology = self.policy.topology
        multiple = topology.pipeline.size if topology.virtual_pipeline > 1 else 1
        for index in range(len(chain), -(-len(chain) // multiple) * multiple):
            denominator = chain[0].denominator
            chain.append(pack([], index, denominator, topology.device, self.policy.token_multiple))
        self._accumulate(chain, reduce=False)
        kinds: tuple[What | None, ...] = ("gradient", "projection", None)
        mine = 0 if not gradient_fits(self.policy) else 1 if self.unprojected() else 2
        return kinds[topology.least(mine, topology.model)]

    def unprojected(self) -> list[int]:
        """Return microbatches that could not be projected in the last pass, on this rank."""
        return self.accumulator.tally.not_finite() if self.accumulator is not None else []

    def _accumulate(self, microbatches: Sequence[Microbatch], reduce: bool) -> Sums:
        return forward_backward(
            self.policy,
            microbatches,
            self.options,
            accumulator=self.accumulator,
            temperature=self.temperature,
            reduce=reduce,
        )


def is_finite(done: MinibatchPass, sums: Sums) -> bool:
    """Tell whether the update that this pass has prepared may be made; the same on every rank.

    Args:
        sums: of this replica.
    """
    good = not sums.bad_losses and not done.unprojected() and gradient_fits(done.policy)
    return done.policy.topology.least(int(good)) == 1


def gradient_fits(policy: Policy) -> bool:
    """Tell whether this rank's gradients, and their squares added up over ranks, are finite.

    Squares are what clipping and Adam make of them: where these overflow, the clipped gradient is
    0, or Adam's second moment infinite for good, and no gradient is NaN.
    """
    buffers = [
        buffer.grad_data
        for chunk in policy.chunks
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]
    if not buffers:
        return True
    # Of a sum of squares NaN and infinity are seen as well, in one pass and without a copy.
    norms = torch.stack([torch.linalg.vector_norm(buffer) for buffer in buffers]).double()
    largest = min(torch.finfo(buffer.dtype).max for buffer in buffers)
    return float(norms.square().sum()) <= largest / policy.topology.world_size


Plan = list[list[int]]  # a replica's microbatches, as places among the sequences


@dataclass(frozen=True)
class MinibatchGradients:
    """Gradients of one minibatch in ``main_grad``, and what they were made of."""

    done: MinibatchPass
    mine: Sums  # of this replica
    sums: Sums  # of all
    sequences: Sequence[TrainingSequence]  # of all replicas, as they went in
    plans: list[Plan]
    denominator: float
    scaling: list[torch.Tensor]  # what delayed scaling remembered before it
