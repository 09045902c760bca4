"""What the rules have in common: the captures of a group, and the one sum over tensor ranks.

Three updaters turn a group of captured parameters into changes of ``main_grad``: `Projecting`
(PROMA's rules), `Preconditioning` (ISOPO's) and `Deflating` (Intra-PROMA's). Each reduces what its
rule needs over the tensor-parallel group, solves the same small problems in float64 on every rank,
and changes the rank's own part of ``main_grad``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
import torch.distributed as dist

from proma_megatron.distributed.topology import Axis
from proma_megatron.projection.diagnostics import Tally
from proma_megatron.projection.factors.linear import Factors, Part, VectorFactors
from proma_megatron.projection.units import Unit
from proma_megatron.types import Microbatch
from proma_megatron.weights.mapping import ParameterShard, Reduction


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


class Updater[Pending, Started, Late](Protocol):
    """One rule at work. ``tally`` collects its figures; a new one is set at each step.

    A parameter is taken when its layer hands over its factors, and finished with its group: what
    ``take`` returns waits for ``start``, and what that returns, a sum over tensor ranks under way,
    for ``finish``. What holds little memory may wait on, for the end of the microbatch's backward
    pass: small problems cost less together.
    """

    tally: Tally
    accumulates: bool  # K comes with overlaps with what has been accumulated

    def asks_for_gradients(self, *, first: bool) -> bool:
        """Whether K is formed from a weight's sequence gradients, so that keeping them pays."""
        ...

    def take(self, capture: Capture, microbatch: Microbatch) -> list[Pending]:
        """What the parameter's units wait with; units that are added plainly are so at once."""
        ...

    def start(self, pending: Sequence[Pending]) -> Started:
        """Start the sum over tensor ranks that a group's units are solved from.

        All tensor ranks start those of all groups in the same order, that of their backward passes,
        in which the layers' own collectives have the same places.
        """
        ...

    def finish(self, started: Started, microbatch: Microbatch) -> Sequence[Late]:
        """Add the microbatch to ``main_grad`` of these units, as the rule has it.

        Returns:
            Units that can wait, and need no other rank any more.

        What is not finite raises nothing, or one rank would leave the others waiting: the unit gets
        the microbatch plainly, and `Tally.not_finite` names the microbatch afterwards. All tensor
        ranks solve from the same sums, and so agree.
        """
        ...

    def finish_late(self, late: Sequence[Late], microbatch: Microbatch) -> None:
        """As `finish`, of units that `finish` has returned, from any number of groups."""
        ...


@dataclass(frozen=True)
class Sum:
    """Tensors that are being added up over tensor ranks."""

    parts: Sequence[torch.Tensor]  # this rank's
    flat: torch.Tensor | None = None  # all of them, the whole ones when ``work`` is done
    work: dist.Work | None = None

    def wait(self) -> list[torch.Tensor]:
        """The whole tensors. On a GPU its stream waits, not the host."""
        if self.flat is None:
            return list(self.parts)
        if self.work is not None:
            self.work.wait()
        pieces = self.flat.split([part.numel() for part in self.parts])
        return [piece.view(part.shape) for piece, part in zip(pieces, self.parts, strict=True)]


@dataclass(frozen=True)
class GroupSum:
    """The summands of a group's units on their way."""

    units: Sequence[Summands]
    shared: Sum

    def wait(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Each unit's summands added up over TP; what every rank holds whole, as it is."""
        summed = iter(self.shared.wait())
        return iter(
            [
                found.tensors
                if found.unit.reduction is Reduction.REPLICATED
                else tuple(next(summed) for _ in found.tensors)
                for found in self.units
            ]
        )


def start_group_sum(units: Sequence[Summands], tensor: Axis) -> GroupSum:
    """Add up each unit's summands (float64) over TP, all of them in one collective."""
    shared = [
        part
        for found in units
        if found.unit.reduction is not Reduction.REPLICATED
        for part in found.tensors
    ]
    return GroupSum(units, start_sum(shared, tensor))


def start_sum(parts: Sequence[torch.Tensor], tensor: Axis) -> Sum:
    """Add up every one of these float64 tensors over TP, in one collective; none for none."""
    if not parts or tensor.size == 1:
        return Sum(parts)
    flat = torch.cat([part.flatten() for part in parts])
    return Sum(parts, flat, dist.all_reduce(flat, group=tensor.group, async_op=True))


def sum_together(parts: Sequence[torch.Tensor], tensor: Axis) -> list[torch.Tensor]:
    """The same, waited for."""
    return start_sum(parts, tensor).wait()


def triangle(gram: torch.Tensor) -> torch.Tensor:
    """Half of a symmetric (k, k), (k (k + 1) / 2,): what is worth sending."""
    rows, columns, _ = _indices(gram.shape[-1], gram.device)
    return gram[rows, columns]


def symmetric(triangles: torch.Tensor, k: int) -> torch.Tensor:
    """(..., k (k + 1) / 2) as it was, (..., k, k)."""
    _, _, places = _indices(k, triangles.device)
    return triangles[..., places]


@lru_cache(maxsize=64)
def _indices(k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows and columns of the lower triangle, and where each (k, k) entry is among them."""
    rows, columns = torch.tril_indices(k, k, device=device)
    places = torch.empty(k, k, dtype=torch.int64, device=device)
    places[rows, columns] = places[columns, rows] = torch.arange(len(rows), device=device)
    return rows, columns, places


def add_plainly(capture: Capture, units: Iterable[Unit], advantages: torch.Tensor) -> None:
    """``A <- A + G a`` on this rank's entries of these units, in as few pieces as they allow."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(run for unit in units for run in unit.rows):
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, stop))
    _add(capture, [(tuple(merged), advantages)])


def add_unprojected(
    capture: Capture, microbatch: Microbatch, *, projects: bool = True
) -> list[Unit]:
    """Add units that the rule leaves alone plainly; the others.

    Args:
        projects: False: the rule leaves all of them alone.
    """
    projects = projects and microbatch.sequences.count > 0
    projected = [unit for unit in capture.units if unit.projected and projects]
    plain = [unit for unit in capture.units if not (unit.projected and projects)]
    add_plainly(capture, plain, microbatch.advantages)
    return projected


def add(units: Iterable[tuple[Capture, Unit]], coefficients: Iterable[torch.Tensor]) -> None:
    """``A <- A + G coefficients`` on this rank's entries of each unit; coefficients (k,)."""
    parts: dict[int, tuple[Capture, list[Part]]] = {}
    for (capture, unit), values in zip(units, coefficients, strict=True):
        _, found = parts.setdefault(id(capture), (capture, []))
        found.append((unit.rows, values))
    for capture, found in parts.values():
        _add(capture, found)


def _add(capture: Capture, parts: Sequence[Part]) -> None:
    parts = [(rows, values) for rows, values in parts if rows and len(values)]
    if parts:
        capture.factors.update(parts, capture.main_grad)
