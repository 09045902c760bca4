"""What the rules have in common: the captures of a group, and the one sum over tensor ranks.

Three updaters turn a group of captured parameters into changes of ``main_grad``: `PromaUpdater`
(PROMA's rules), `IsopoUpdater` (ISOPO's) and `IntraPromaUpdater` (Intra-PROMA's). Each reduces what
its rule needs over the tensor-parallel group, solves the same small problems in float64 on every
rank, and changes the rank's own part of ``main_grad``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from proma_megatron.projection.capture import Capture
from proma_megatron.projection.diagnostics import Tally
from proma_megatron.projection.factors.base import Part
from proma_megatron.projection.rules.proma import Solution
from proma_megatron.projection.units import Unit
from proma_megatron.types import Microbatch


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
        """Tell whether K is formed from a weight's sequence gradients: keeping them pays."""
        ...

    def solve(
        self, gram: torch.Tensor, overlap: torch.Tensor, advantages: torch.Tensor
    ) -> Solution | None:
        """Return what a microbatch is added with; None where K and c alone don't say it.

        Args:
            gram: K (..., k, k) float64 of any number of units.
            overlap: c (..., k).
            advantages: a (k,).
        """
        ...

    def take(self, capture: Capture, microbatch: Microbatch) -> list[Pending]:
        """Return what the parameter's units wait with; those that are added plainly don't wait."""
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
        """Finish units that `finish` has returned, from any number of groups."""
        ...


def add_plainly(capture: Capture, units: Iterable[Unit], advantages: torch.Tensor) -> None:
    """Set ``A <- A + G a`` on this rank's entries of these units, in as few pieces as possible."""
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
    """Set ``A <- A + G coefficients`` on this rank's entries of each unit; coefficients (k,)."""
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
