"""ISOPO's rules at work: transform the microbatch's advantages by unit, then add the microbatch.

What is summed over the tensor-parallel group, in one collective: K (k, k) of a weight or bias,
whose ranks hold entries of their own; G^T (k, n) of a norm weight of which each rank computes a
summand, for the sum of Gram matrices is not the Gram matrix of the sum. All units of a group have
one k, and are solved together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from proma_megatron.config import ProjectionConfig
from proma_megatron.policy.parameters import Reduction
from proma_megatron.projection.diagnostics import Tally
from proma_megatron.projection.factors import VectorFactors, take
from proma_megatron.projection.isopo import Kind, precondition
from proma_megatron.projection.solver import (
    Capture,
    Summands,
    add,
    sum_over_tensor_group,
)
from proma_megatron.projection.units import Unit
from proma_megatron.records import Microbatch
from proma_megatron.topology import Axis


class Preconditioning:
    """Adds microbatches with advantages that each unit's K has transformed."""

    def __init__(self, config: ProjectionConfig, tensor: Axis) -> None:
        assert config.rule in ("kernel", "norm")
        self.kind: Kind = config.rule
        self.regularization = config.regularization
        self.tensor = tensor
        self.tally = Tally()

    def asks_for_gradients(self, *, first: bool) -> bool:
        return True  # K says how to add a microbatch, whatever is there already

    def update(self, captures: Sequence[Capture], microbatch: Microbatch) -> None:
        """``A <- A + G a'`` for every unit of these parameters."""
        units: list[Summands] = []
        for capture in captures:
            for unit in capture.units:
                if unit.projected and microbatch.sequences.count:
                    units.append(_summands(capture, unit))
                else:
                    add(capture, unit, microbatch.advantages)
        if not units:
            return
        sums = sum_over_tensor_group(units, self.tensor)
        gram = torch.stack(
            [_gram(found, whole) for found, (whole,) in zip(units, sums, strict=True)]
        )
        solution = precondition(
            self.kind, gram, microbatch.advantages, regularization=self.regularization
        )
        self.tally.check(microbatch.index, solution.finite)
        names = tuple(found.unit.name for found in units)
        self.tally.add(names, gram, solution.policy, microbatch.advantages, solution)
        for found, coefficients in zip(units, solution.coefficients, strict=True):
            add(found.capture, found.unit, coefficients)


def _summands(capture: Capture, unit: Unit) -> Summands:
    if not isinstance(capture.factors, VectorFactors):
        return Summands(capture, unit, (capture.factors.products(unit.rows)[0],))
    gradients = take(capture.factors.gradients.double(), unit.rows)
    if unit.reduction is Reduction.PARTIAL:
        return Summands(capture, unit, (gradients,))
    return Summands(capture, unit, (gradients @ gradients.T,))


def _gram(found: Summands, whole: torch.Tensor) -> torch.Tensor:
    """K (k, k), from itself or from a norm's whole vectors."""
    vectors = isinstance(found.capture.factors, VectorFactors)
    return whole @ whole.T if vectors and found.unit.reduction is Reduction.PARTIAL else whole
