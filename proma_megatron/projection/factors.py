"""Sequence gradients of one parameter and microbatch, as factors that are contracted on demand.

Every kind of layer gives G_s, the gradient of sequence s, in its own form. Three questions are
asked of it, each about a unit's rows: the Gram matrix K, the overlaps c with the accumulated
gradient A, and the update ``A += sum_s coefficient_s G_s``. Of short vectors only the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

from proma_megatron.records import Sequences

Rows = tuple[tuple[int, int], ...]


class Factors(Protocol):
    """The sequence gradients of one weight or table in one microbatch."""

    def products(
        self, rows: Rows, accumulated: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K (k, k) and c (k,) over these rows, float64, of this rank's entries.

        Without ``accumulated`` c is 0, and costs nothing.
        """
        ...

    def update(self, rows: Rows, accumulated: torch.Tensor, coefficients: torch.Tensor) -> None:
        """``accumulated[rows] += sum_s coefficients_s G_s[rows]``; coefficients (k,) float64."""
        ...


class VectorFactors:
    """Norm weights and biases: G^T (k, n) is small, kept, and projected as it is."""

    def __init__(self, gradients: torch.Tensor) -> None:
        self.gradients = gradients  # (k, n) in the accumulation dtype

    def update(self, rows: Rows, accumulated: torch.Tensor, coefficients: torch.Tensor) -> None:
        for start, stop in rows:
            part = coefficients @ self.gradients[:, start:stop].double()
            accumulated[start:stop] += part.to(accumulated.dtype)


def take(matrix: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The columns of ``matrix`` (k, n) that a unit's rows name, side by side."""
    return torch.cat([matrix[:, start:stop] for start, stop in rows] or [matrix[:, :0]], dim=1)


class DenseFactors:
    """A linear weight: ``G_s = dY_s^T X_s`` (out, in), optionally plus rows of an embedding.

    Materialized, G (k, out, in) is formed once and serves the products and the update, in place of
    the ordinary weight gradient. Streamed, blocks of rows are formed, contracted and dropped, and
    the update is the ordinary weight-gradient GEMM with scaled rows.
    """

    def __init__(
        self,
        x: torch.Tensor,
        dy: torch.Tensor,
        sequences: Sequences,
        *,
        dtype: torch.dtype,
        block_bytes: int,
        materialize: bool,
        lookup: Lookup | None = None,
    ) -> None:
        self.x = x.to(dtype)  # (T, in)
        self.dy = dy.to(dtype)  # (T, out)
        self.sequences = sequences
        self.lookup = lookup
        self.block_bytes = block_bytes
        row_bytes = max(1, sequences.count * x.shape[1] * dtype.itemsize)
        self.block = max(1, block_bytes // row_bytes)
        self.gradients = self._form(0, dy.shape[1]) if materialize else None

    def _form(self, start: int, stop: int) -> torch.Tensor:
        """G (k, stop - start, in) of these output rows."""
        offsets = self.sequences.offsets
        out = self.x.new_empty((self.sequences.count, stop - start, self.x.shape[1]))
        for s, (low, high) in enumerate(pairwise(offsets)):
            torch.mm(self.dy[low:high, start:stop].t(), self.x[low:high], out=out[s])
        if self.lookup is not None:
            self.lookup.add_to(out, start, stop, self.sequences)
        return out

    def _blocks(self, rows: Rows) -> Iterator[tuple[int, int, torch.Tensor]]:
        for start, stop in rows:
            if self.gradients is not None:
                yield start, stop, self.gradients[:, start:stop]
                continue
            for low in range(start, stop, self.block):
                high = min(low + self.block, stop)
                yield low, high, self._form(low, high)

    def products(
        self, rows: Rows, accumulated: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k = self.sequences.count
        gram = self.x.new_zeros((k, k), dtype=torch.float64)
        overlap = self.x.new_zeros(k, dtype=torch.float64)
        for low, high, gradients in self._blocks(rows):
            flat = gradients.flatten(1)
            gram += flat @ flat.T
            if accumulated is not None:
                overlap += flat @ accumulated[low:high].flatten()
        return gram, overlap

    def update(self, rows: Rows, accumulated: torch.Tensor, coefficients: torch.Tensor) -> None:
        if self.gradients is not None:
            weights = coefficients.to(self.gradients.dtype)
            for start, stop in rows:
                target = accumulated[start:stop]
                target += (weights @ self.gradients[:, start:stop].flatten(1)).view_as(target)
            return
        per_token = self.sequences.per_token(coefficients).to(self.dy.dtype)
        for start, stop in rows:
            accumulated[start:stop].addmm_(
                (self.dy[:, start:stop] * per_token[:, None]).t(), self.x
            )
        if self.lookup is not None:
            self.lookup.update(rows, accumulated, per_token)

    def accumulate(
        self, rows: Rows, accumulated: torch.Tensor, coefficients: torch.Tensor
    ) -> torch.Tensor:
        """As `update`, without a lookup; |what was added|^2 (), float64, of this rank's entries."""
        assert self.lookup is None
        per_token = self.sequences.per_token(coefficients).to(self.dy.dtype)
        energy = self.x.new_zeros((), dtype=torch.float64)
        # A block, and dY of its rows, take at most block_bytes each.
        step = max(1, self.block_bytes // (max(self.x.shape) * self.x.element_size()))
        for start, stop in rows:
            for low in range(start, stop, step):
                high = min(low + step, stop)
                part = (self.dy[:, low:high] * per_token[:, None]).t() @ self.x
                accumulated[low:high] += part
                energy += torch.linalg.vector_norm(part, dtype=torch.float64).square()
        return energy


@dataclass(frozen=True)
class Lookup:
    """Gradient of an embedding: row ``rows[t]`` of the table receives ``dy[t]``."""

    rows: torch.Tensor  # (T,) local table rows, -1 for tokens of other ranks
    dy: torch.Tensor  # (T, h) in the accumulation dtype

    def add_to(self, out: torch.Tensor, start: int, stop: int, sequences: Sequences) -> None:
        """Add this lookup's G to dense blocks ``out`` (k, stop - start, h)."""
        here = (self.rows >= start) & (self.rows < stop) & (sequences.owner < sequences.count)
        tokens = here.nonzero()[:, 0]
        flat = sequences.owner[tokens] * (stop - start) + self.rows[tokens] - start
        out.view(-1, out.shape[-1]).index_add_(0, flat, self.dy[tokens])

    def update(self, rows: Rows, accumulated: torch.Tensor, per_token: torch.Tensor) -> None:
        for start, stop in rows:
            tokens = ((self.rows >= start) & (self.rows < stop)).nonzero()[:, 0]
            accumulated.index_add_(0, self.rows[tokens], self.dy[tokens] * per_token[tokens, None])


class LookupFactors:
    """An untied embedding: G_s has rows only for the tokens of its sequence."""

    def __init__(self, lookup: Lookup, sequences: Sequences, block_bytes: int) -> None:
        self.lookup = lookup
        self.sequences = sequences
        width = lookup.dy.shape[1] * lookup.dy.element_size()
        self.block = max(1, block_bytes // max(1, sequences.count * width))

    def products(
        self, rows: Rows, accumulated: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k, lookup, owner = self.sequences.count, self.lookup, self.sequences.owner
        gram = lookup.dy.new_zeros((k, k), dtype=torch.float64)
        overlap = lookup.dy.new_zeros(k, dtype=torch.float64)
        inside = torch.zeros_like(lookup.rows, dtype=torch.bool)
        for start, stop in rows:
            inside |= (lookup.rows >= start) & (lookup.rows < stop)
        tokens = (inside & (owner < k)).nonzero()[:, 0]
        used, compact = lookup.rows[tokens].unique(return_inverse=True)
        for low in range(0, len(used), self.block):
            high = min(low + self.block, len(used))
            here = ((compact >= low) & (compact < high)).nonzero()[:, 0]
            dense = lookup.dy.new_zeros((k, high - low, lookup.dy.shape[1]))
            flat = owner[tokens[here]] * (high - low) + compact[here] - low
            dense.view(-1, dense.shape[-1]).index_add_(0, flat, lookup.dy[tokens[here]])
            block = dense.flatten(1)
            gram += block @ block.T
            if accumulated is not None:
                overlap += block @ accumulated[used[low:high]].flatten()
        return gram, overlap

    def update(self, rows: Rows, accumulated: torch.Tensor, coefficients: torch.Tensor) -> None:
        per_token = self.sequences.per_token(coefficients).to(self.lookup.dy.dtype)
        self.lookup.update(rows, accumulated, per_token)
