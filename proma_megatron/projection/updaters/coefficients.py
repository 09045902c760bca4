"""Rules that transform the microbatch's advantages by unit, then add the microbatch.

What is summed over the tensor-parallel group, in one collective: K (k, k) of a weight or bias,
whose ranks hold entries of their own; G^T (k, n) of a norm weight of which each rank computes a
summand, for the sum of Gram matrices is not the Gram matrix of the sum. All units of a group have
one k, and are solved together.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Never

import torch

from proma_megatron.distributed.topology import Axis
from proma_megatron.projection.capture import Capture
from proma_megatron.projection.diagnostics import Tally
from proma_megatron.projection.factors.vector import VectorFactors, take
from proma_megatron.projection.rules.proma import Solution
from proma_megatron.projection.units import Unit
from proma_megatron.projection.updaters.sums import (
    GroupSum,
    PartialSums,
    start_group_sum,
    symmetric,
    triangle,
)
from proma_megatron.projection.updaters.updater import add, add_unprojected
from proma_megatron.types import Microbatch
from proma_megatron.weights.shards import Reduction


class CoefficientUpdater:
    """Adds microbatches with coefficients, unit by unit, instead of their advantages.

    A rule of this kind says by `solve` which ones.
    """

    def __init__(self, tensor: Axis) -> None:
        self.tensor = tensor
        self.tally = Tally()
        self.accumulates = False

    @abstractmethod
    def solve(
        self, gram: torch.Tensor, overlap: torch.Tensor | None, advantages: torch.Tensor
    ) -> Solution:
        """Return the coefficients, see `Updater.solve`; c is None, for A plays no part.

        Of a unit that is not finite, the coefficients are the advantages.
        """

    def asks_for_gradients(self, *, first: bool) -> bool:
        return True  # K says how to add a microbatch, whatever is there already

    def take(self, capture: Capture, microbatch: Microbatch) -> list[PartialSums]:
        projected = add_unprojected(capture, microbatch)
        if isinstance(capture.factors, VectorFactors):
            return [_vector(capture, unit, capture.factors) for unit in projected]
        if not projected:
            return []
        products = capture.factors.products([unit.rows for unit in projected])
        return [
            PartialSums(capture, unit, (triangle(found.gram),))
            for unit, found in zip(projected, products, strict=True)
        ]

    def start(self, pending: Sequence[PartialSums]) -> GroupSum:
        return start_group_sum(pending, self.tensor)

    def finish(self, started: GroupSum, microbatch: Microbatch) -> list[Never]:
        """Set ``A <- A + G a'`` for every unit."""
        pending, sums = started.units, started.wait()
        k = len(microbatch.advantages)
        gram = torch.stack(
            [_gram(found, whole, k) for found, (whole,) in zip(pending, sums, strict=True)]
        )
        solution = self.solve(gram, None, microbatch.advantages)
        self.tally.check(microbatch.index, solution.finite)
        names = tuple(found.unit.name for found in pending)
        self.tally.add(names, gram, solution.policy, microbatch.advantages, solution)
        add([(found.capture, found.unit) for found in pending], solution.coefficients)
        return []

    def finish_late(self, late: Sequence[Never], microbatch: Microbatch) -> None:
        """Finish nothing: nothing waits."""


def _vector(capture: Capture, unit: Unit, factors: VectorFactors) -> PartialSums:
    gradients = take(factors.gradients.double(), unit.rows)
    if unit.reduction is Reduction.PARTIAL:
        return PartialSums(capture, unit, (gradients,))
    return PartialSums(capture, unit, (triangle(gradients @ gradients.T),))


def _gram(found: PartialSums, whole: torch.Tensor, k: int) -> torch.Tensor:
    """Return K (k, k), from half of it or from a norm's whole vectors."""
    vectors = isinstance(found.capture.factors, VectorFactors)
    if vectors and found.unit.reduction is Reduction.PARTIAL:
        return whole @ whole.T
    return symmetric(whole, k)
