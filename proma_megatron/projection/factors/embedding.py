"""Sequence gradients of an embedding: the rows that tokens look up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from proma_megatron.projection.factors.base import Part
from proma_megatron.projection.factors.contraction import (
    Products,
    Rows,
    by_unit,
    contract,
    dots,
)
from proma_megatron.projection.factors.workspace import Workspace
from proma_megatron.projection.host_sync import add_rows, distinct
from proma_megatron.types import PackedSequences


@dataclass(frozen=True)
class Lookup:
    """Gradient of an embedding: row ``rows[t]`` of the table receives ``dy[t]``."""

    rows: torch.Tensor  # (T,) local table rows, -1 for tokens of other ranks
    dy: torch.Tensor  # (T, h) in the accumulation dtype

    def add_to(self, out: torch.Tensor, start: int, stop: int, sequences: PackedSequences) -> None:
        """Add this lookup's G to dense blocks ``out`` (k, stop - start, h)."""
        here = (self.rows >= start) & (self.rows < stop) & (sequences.owner < sequences.count)
        places = sequences.owner * (stop - start) + self.rows - start
        add_rows(out.view(-1, out.shape[-1]), places, self.dy, here)

    def update(self, rows: Rows, accumulated: torch.Tensor, per_token: torch.Tensor) -> None:
        for start, stop in rows:
            here = (self.rows >= start) & (self.rows < stop)
            add_rows(accumulated, self.rows, self.dy, here, per_token)


class LookupFactors:
    """An untied embedding: G_s has rows only for the tokens of its sequence."""

    def __init__(self, lookup: Lookup, sequences: PackedSequences, workspace: Workspace) -> None:
        self.lookup = lookup
        self.sequences = sequences
        self.workspace = workspace

    @property
    def nbytes(self) -> int:
        return self.lookup.dy.nbytes

    def products(
        self, units: Sequence[Rows], accumulated: torch.Tensor | None = None
    ) -> list[Products]:
        return [self._products(rows, accumulated) for rows in units]

    def update(self, parts: Sequence[Part], accumulated: torch.Tensor) -> None:
        for rows, coefficients in parts:
            per_token = self.sequences.per_token(coefficients).to(self.lookup.dy.dtype)
            self.lookup.update(rows, accumulated, per_token)

    def _products(self, rows: Rows, accumulated: torch.Tensor | None) -> Products:
        k, lookup, owner = self.sequences.count, self.lookup, self.sequences.owner
        width = lookup.dy.shape[1]
        inside = torch.zeros_like(lookup.rows, dtype=torch.bool)
        for start, stop in rows:
            inside |= (lookup.rows >= start) & (lookup.rows < stop)
        inside &= owner < k
        used, places = distinct(lookup.rows, inside)
        row_bytes = (k + 1) * width * lookup.dy.element_size()
        block = max(1, self.workspace.block_bytes // row_bytes)
        sums = lookup.dy.new_zeros((k + (accumulated is not None), k), dtype=torch.float64)
        for low in range(0, len(used), block):
            high = min(low + block, len(used))
            here = inside & (places >= low) & (places < high)
            stack = self.workspace.scratch((len(sums), high - low, width), lookup.dy.dtype)
            stack[:k] = 0
            flat = owner * (high - low) + places - low
            add_rows(stack.view(-1, width), flat, lookup.dy, here)
            if accumulated is not None:
                torch.index_select(accumulated, 0, used[low:high], out=stack[k])
            sums += contract(stack, k, 1).sum(dim=0, dtype=torch.float64)
        if accumulated is None:
            nothing = sums.new_zeros(())
            return Products(sums, nothing.expand(k), nothing)
        # What no token of the microbatch uses is part of |A|^2, though of no product.
        (energy,) = by_unit(dots(accumulated, accumulated, 1), [rows], 1)
        return Products(sums[:k], sums[k], energy)
