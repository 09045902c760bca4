"""Sums over tensor ranks of what each has formed of K, c and norms: one a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist

from proma_megatron.distributed.topology import Axis
from proma_megatron.projection.capture import Capture
from proma_megatron.projection.units import Unit
from proma_megatron.weights.shards import Reduction


@dataclass(frozen=True)
class PartialSums:
    """What this rank adds to the sums that a unit is solved from; which, the updater says."""

    capture: Capture
    unit: Unit
    tensors: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Sum:
    """Tensors that are being added up over tensor ranks."""

    parts: Sequence[torch.Tensor]  # this rank's
    flat: torch.Tensor | None = None  # all of them, the whole ones when ``work`` is done
    work: dist.Work | None = None

    def wait(self) -> list[torch.Tensor]:
        """Return the whole tensors. On a GPU its stream waits, not the host."""
        if self.flat is None:
            return list(self.parts)
        if self.work is not None:
            self.work.wait()
        pieces = self.flat.split([part.numel() for part in self.parts])
        return [piece.view(part.shape) for piece, part in zip(pieces, self.parts, strict=True)]


@dataclass(frozen=True)
class GroupSum:
    """The summands of a group's units on their way."""

    units: Sequence[PartialSums]
    shared: Sum

    def wait(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Return each unit's summands added up over TP; what every rank holds whole, as it is."""
        summed = iter(self.shared.wait())
        return iter(
            [
                found.tensors
                if found.unit.reduction is Reduction.REPLICATED
                else tuple(next(summed) for _ in found.tensors)
                for found in self.units
            ]
        )


def start_group_sum(units: Sequence[PartialSums], tensor: Axis) -> GroupSum:
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
    """Add up as `start_sum` does, and wait."""
    return start_sum(parts, tensor).wait()


def triangle(gram: torch.Tensor) -> torch.Tensor:
    """Return half of a symmetric (k, k), (k (k + 1) / 2,): what is worth sending."""
    rows, columns, _ = _indices(gram.shape[-1], gram.device)
    return gram[rows, columns]


def symmetric(triangles: torch.Tensor, k: int) -> torch.Tensor:
    """Return (..., k (k + 1) / 2) as it was, (..., k, k)."""
    _, _, places = _indices(k, triangles.device)
    return triangles[..., places]


@lru_cache(maxsize=64)
def _indices(k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rows and columns of the lower triangle, and where each (k, k) entry is among them."""
    rows, columns = torch.tril_indices(k, k, device=device)
    places = torch.empty(k, k, dtype=torch.int64, device=device)
    places[rows, columns] = places[columns, rows] = torch.arange(len(rows), device=device)
    return rows, columns, places
