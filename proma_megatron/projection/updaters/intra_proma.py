"""Intra-PROMA's rule at work: add the microbatch without its part in the dominant subspaces.

Units of linear weights have the two factors that the rule speaks of; embeddings (a table tied to
the head too), norms and biases have not, and are accumulated plainly. G is added to ``main_grad``
as it is formed, block by block, and the removed part is subtracted afterwards in factored form, so
no second gradient is ever held.

On a GPU the host waits once a layer, for the eigenvectors of small matrices (`subspace._ritz`):
rotations without a look at their outcome would take a thousand launches at rank 8. What orders
directions by size can't do without eigenvectors as PROMA's rules can. Of `torch.linalg.qr` torch
documents no such wait, as it does of `eigh` and `svd`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Never

import torch

from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.distributed.topology import Axis
from proma_megatron.projection.capture import Capture
from proma_megatron.projection.diagnostics import Tally
from proma_megatron.projection.factors.linear import LinearFactors
from proma_megatron.projection.rules.intra_proma import (
    Removal,
    Sides,
    Subspace,
    TokenMatrix,
    dominant,
    removal,
)
from proma_megatron.projection.rules.proma import clamp_factor, masked
from proma_megatron.projection.units import Unit
from proma_megatron.projection.updaters.sums import sum_together
from proma_megatron.projection.updaters.updater import add_plainly
from proma_megatron.types import Microbatch
from proma_megatron.weights.shards import Reduction


@dataclass(frozen=True)
class _Linear:
    """One linear unit with its two factors; units of a fused weight share one X."""

    capture: Capture
    factors: LinearFactors
    unit: Unit
    x: TokenMatrix
    dy: TokenMatrix


class IntraPromaUpdater:
    """Adds microbatches without what dominates their activations and output gradients.

    Args:
        dtype: the compute dtype, as for the other updaters; of no matter for this rule.
    """

    def __init__(self, config: ProjectionConfig, tensor: Axis, dtype: torch.dtype) -> None:
        assert config.rule == "subspace"
        self.rank = config.rank
        self.sides: Sides = config.sides
        self.shrinkage = config.shrinkage
        self.bound = config.bound
        self.tensor = tensor
        self.tally = Tally()
        self.accumulates = False

    def solve(self, gram: torch.Tensor, overlap: torch.Tensor, advantages: torch.Tensor) -> None:
        """Return None: the rule works on X and dY."""

    def asks_for_gradients(self, *, first: bool) -> bool:
        return False  # of no sequence by itself

    def take(self, capture: Capture, microbatch: Microbatch) -> list[_Linear]:
        if microbatch.sequences.count and isinstance(capture.factors, LinearFactors):
            linears = self._linears(capture, capture.factors, microbatch)
        else:
            linears = []
        taken = {linear.unit.name for linear in linears}
        add_plainly(
            capture, [u for u in capture.units if u.name not in taken], microbatch.advantages
        )
        return linears

    def start(self, pending: Sequence[_Linear]) -> Sequence[_Linear]:
        """Start nothing: each of this rule's sums needs what the one before it gave."""
        return pending

    def finish(self, started: Sequence[_Linear], microbatch: Microbatch) -> list[Never]:
        """Set ``A <- A + G - shrinkage * clamp(R)`` for every linear unit."""
        self._remove(started, microbatch)
        return []

    def finish_late(self, late: Sequence[Never], microbatch: Microbatch) -> None:
        """Finish nothing: nothing waits."""

    def _linears(
        self, capture: Capture, factors: LinearFactors, microbatch: Microbatch
    ) -> list[_Linear]:
        """Return the linear units of one weight. Of X or dY, TP cuts what its axis says."""
        cut = capture.shard.reduction is Reduction.DISJOINT
        matrix = partial(
            TokenMatrix,
            tokens=microbatch.sequences.offsets[-1],  # padding comes after the last sequence
            block_bytes=factors.workspace.half,
        )
        column = capture.shard.axis == 0
        x = matrix(factors.x, columns=[(0, factors.x.shape[1])], sharded=cut and not column)
        return [
            _Linear(
                capture,
                factors,
                unit,
                x,
                matrix(factors.dy, columns=unit.rows, sharded=cut and column),
            )
            for unit in capture.units
            if unit.projected
        ]

    def _remove(self, linears: Sequence[_Linear], microbatch: Microbatch) -> None:
        advantages = microbatch.advantages
        per_token = microbatch.sequences.per_token(advantages)
        found = self._dominant(linears)
        removals = [
            removal(self.sides, u.x, u.dy, found.get(id(u.x)), found.get(id(u.dy)), per_token)
            for u in linears
        ]
        energies = [
            u.factors.accumulate(u.unit.rows, u.capture.main_grad, advantages) for u in linears
        ]
        square, energy = self._sums(linears, removals, energies)
        factor = clamp_factor(square, energy, self.bound) * self.shrinkage
        sound = torch.stack([_is_finite(u, found) for u in linears])
        finite = sound & (square + energy).isfinite()
        self.tally.check(microbatch.index, finite)
        names = tuple(u.unit.name for u in linears)
        self.tally.add_energies(names, square * factor**2, energy, factor < self.shrinkage)
        for u, removed, scale, kept in zip(linears, removals, factor, finite, strict=True):
            _subtract(u, removed, scale, kept)

    def _dominant(self, linears: Sequence[_Linear]) -> dict[int, Subspace]:
        """Return the subspaces that the sides ask for, by the identity of their matrix."""
        matrices: dict[int, TokenMatrix] = {}
        for u in linears:
            if self.sides != "output":
                matrices[id(u.x)] = u.x
            if self.sides != "input":
                matrices[id(u.dy)] = u.dy
        reduce = partial(sum_together, tensor=self.tensor)
        found = dominant(list(matrices.values()), self.rank, reduce)
        return dict(zip(matrices, found, strict=True))

    def _sums(
        self,
        linears: Sequence[_Linear],
        removals: Sequence[Removal],
        energies: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return |R|^2 and |G|^2 (U,) of the whole units, in one collective."""
        square = torch.stack([found.square for found in removals])
        energy = torch.stack(list(energies))
        cut = [u.capture.shard.reduction is Reduction.DISJOINT for u in linears]
        if not any(cut):
            return square, energy
        # Which squares are of this rank's entries alone, Python knows: no mask goes to the device.
        nothing = torch.zeros_like(energy[0])
        shared = torch.stack([r.square if r.partial else nothing for r in removals])
        (summed,) = sum_together([torch.stack([shared, energy])], self.tensor)
        whole = [s if r.partial else r.square for r, s in zip(removals, summed[0], strict=True)]
        return torch.stack(whole), summed[1]


def _is_finite(u: _Linear, found: Mapping[int, Subspace]) -> torch.Tensor:
    """Return () bool: whether the unit's subspaces mean anything."""
    asked = [found[id(matrix)].finite for matrix in (u.x, u.dy) if id(matrix) in found]
    return torch.stack(asked).all()


def _subtract(u: _Linear, removed: Removal, scale: torch.Tensor, kept: torch.Tensor) -> None:
    """Take ``scale * R`` out of this rank's rows of the unit; nothing where not ``kept`` ()."""
    target, dtype, at = u.capture.main_grad, u.capture.main_grad.dtype, 0
    right = masked(removed.right * scale, kept).to(dtype)
    for low, high in u.unit.rows:
        left = masked(removed.left[at : at + high - low], kept).to(dtype)
        target[low:high].addmm_(left, right, alpha=-1)
        at += high - low
