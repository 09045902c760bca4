"""Inner products of sequence gradients in one pass over them.

Rows of a weight are cut into chunks of a few thousand entries. A chunk's products are summed in the
gradients' own dtype, by one batched matrix product over all chunks; chunks are added up in float64,
each to the unit that has its rows. Small chunks keep all cores busy and the rounding error of
float32 sums short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import torch

Rows = tuple[tuple[int, int], ...]

CHUNK = 4096  # entries


@dataclass(frozen=True)
class Products:
    """What a projection is solved from, of this rank's entries of a unit; float64."""

    gram: torch.Tensor  # K (k, k)
    overlap: torch.Tensor  # c (k,); 0 without an accumulated gradient
    energy: torch.Tensor  # |A|^2 (); 0 without


def chunk_rows(units: Sequence[Rows], rows: int, width: int) -> int:
    """Return how many rows of ``width`` a chunk has, so that no unit and no matrix cuts it.

    Args:
        rows: of the whole matrix.
    """
    edges = {edge for unit in units for run in unit for edge in run}
    return _divisor(gcd(rows, *edges), max(1, CHUNK // width))


@lru_cache(maxsize=1024)
def _divisor(number: int, most: int) -> int:
    """Return the largest divisor that is at most ``most``."""
    return next(found for found in range(min(number, most), 0, -1) if number % found == 0)


def contract(stack: torch.Tensor, count: int, chunk: int) -> torch.Tensor:
    """Return inner products of all slices of ``stack`` (p, rows, width) with the first ``count``.

    Args:
        chunk: rows a chunk, a divisor of ``rows``.

    Returns:
        (rows / chunk, p, count) in the dtype of ``stack``.
    """
    slices, rows, width = stack.shape
    chunks = stack.view(slices, rows // chunk, chunk * width).transpose(0, 1)
    return torch.bmm(chunks, chunks[:, :count].mT)


def dots(left: torch.Tensor, right: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return inner products (rows / chunk,) of the chunks of two matrices (rows, width)."""
    shape = (left.shape[0] // chunk, 1, chunk * left.shape[1])
    return torch.bmm(left.view(shape), right.view(shape).mT)[:, 0, 0]


def by_unit(values: torch.Tensor, units: Sequence[Rows], chunk: int) -> list[torch.Tensor]:
    """Sum the chunks' values (rows / chunk, ...) that each unit has, (...) in float64."""
    found = []
    for unit in units:
        if len(unit) == 1:
            ((start, stop),) = unit
            mine = values[start // chunk : stop // chunk]
        else:
            mine = values.index_select(0, _chunks(unit, chunk, values.device))
        found.append(mine.sum(dim=0, dtype=torch.float64))
    return found


@lru_cache(maxsize=64)
def _chunks(unit: Rows, chunk: int, device: torch.device) -> torch.Tensor:
    """Return the numbers of the chunks that a unit of several runs has."""
    # On the device from the beginning: the host waits for copies of its lists.
    runs = [torch.arange(start // chunk, stop // chunk, device=device) for start, stop in unit]
    return torch.cat(runs or [torch.arange(0, device=device)])


def _products(
    found: torch.Tensor, units: Sequence[Rows], accumulated: torch.Tensor | None, chunk: int
) -> list[Products]:
    """Return those of each unit from its chunks' (n, k, k), or (n, k + 1, k) with c as last row."""
    k = found.shape[2]
    whole = by_unit(found, units, chunk)
    if accumulated is None:
        nothing = found.new_zeros((), dtype=torch.float64)
        return [Products(gram, nothing.expand(k), nothing) for gram in whole]
    energy = by_unit(dots(accumulated, accumulated, chunk), units, chunk)
    return [Products(sums[:k], sums[k], e) for sums, e in zip(whole, energy, strict=True)]
