"""What the rules have in common: the captures of a group, and the one sum over tensor ranks.

Three updaters turn a group of captured parameters into changes of ``main_grad``: `Projecting`
(PROMA's rules), `Preconditioning` (ISOPO's) and `Deflating` (Intra-PROMA's). Each reduces what its
rule needs over the tensor-parallel group, solves the same small problems in float64 on every rank,
and changes the rank's own part of ``main_grad``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from proma_megatron.policy.parameters import ParameterShard, Reduction
from proma_megatron.projection.diagnostics import Tally
from proma_megatron.projection.factors import Factors, VectorFactors
from proma_megatron.projection.units import Unit
from proma_megatron.records import Microbatch
from proma_megatron.topology import Axis


@dataclass(frozen=True)
class Capture:
    """The sequence gradients of one parameter in one microbatch."""

    shard: ParameterShard
    units: tuple[Unit, ...]
    factors: Factors | VectorFactors
    first: bool  # nothing has been accumulated yet

    @property
    def main_grad(self) -> torch.Tensor:
        return self.shard.parameter.main_grad  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Summands:
    """What this rank adds to the sums that a unit is solved from; which, the updater says."""

    capture: Capture
    unit: Unit
    tensors: tuple[torch.Tensor, ...]


class Updater(Protocol):
    """One rule at work. ``tally`` collects its figures; a new one is set at each step."""

    tally: Tally

    def asks_for_gradients(self, *, first: bool) -> bool:
        """Whether K is formed from a weight's sequence gradients, so that keeping them pays."""
        ...

    def update(self, captures: Sequence[Capture], microbatch: Microbatch) -> None:
        """Add the microbatch to ``main_grad`` of these parameters, as the rule has it.

        What is not finite raises nothing, or one rank would leave the others waiting: the unit gets
        the microbatch plainly, and `Tally.not_finite` names the microbatch afterwards. All tensor
        ranks solve from the same sums, and so agree.
        """
        ...


def sum_over_tensor_group(
    units: Sequence[Summands], tensor: Axis
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Each unit's summands (float64) added up over TP, all of them in one collective.

    What every rank holds whole is left as it is.
    """
    shared = [
        part
        for found in units
        if found.unit.reduction is not Reduction.REPLICATED
        for part in found.tensors
    ]
    summed = iter(sum_together(shared, tensor))
    return iter(
        [
            found.tensors
            if found.unit.reduction is Reduction.REPLICATED
            else tuple(next(summed) for _ in found.tensors)
            for found in units
        ]
    )


def sum_together(parts: Sequence[torch.Tensor], tensor: Axis) -> list[torch.Tensor]:
    """Every one of these float64 tensors added up over TP, in one collective; none for none."""
    if not parts:
        return []
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat, group=tensor.group)
    pieces = flat.split([part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def add(capture: Capture, unit: Unit, coefficients: torch.Tensor) -> None:
    """``A <- A + G coefficients`` on this rank's entries of the unit; coefficients (k,)."""
    if unit.rows and len(coefficients):
        capture.factors.update(unit.rows, capture.main_grad, coefficients)
