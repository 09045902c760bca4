"""Sequence gradients of one parameter and microbatch, in the form that each kind of layer gives.

A microbatch asks two things of G (d, k): the products that a rule is solved from, and the update
``A += sum_s coefficient_s G_s``. Of short vectors only the last.

- `SequenceGradients`: G of a weight as it is, formed once. It serves the products and the update,
  and the ordinary weight gradient is never computed.
- `LinearFactors`: X and dY of a weight. G is formed in blocks of rows, contracted and dropped, and
  the update is the ordinary weight-gradient GEMM with scaled rows.
- `LookupFactors`: an embedding's. G_s has rows only for the tokens of its sequence.
- `VectorFactors`: a norm weight's or bias's. G is small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from proma_megatron.projection.factors.base import Part
from proma_megatron.projection.factors.contraction import (
    Products,
    Rows,
    _products,
    chunk_rows,
    contract,
    dots,
)
from proma_megatron.projection.factors.embedding import Lookup
from proma_megatron.projection.factors.gemm import Gemm, TorchGemm
from proma_megatron.projection.factors.workspace import Workspace
from proma_megatron.projection.sizes import kept_slices
from proma_megatron.types import PackedSequences

# --------------------------------------------------------------------------- vectors


# --------------------------------------------------------------------------- linear weights


class LinearFactors:
    """A linear weight: ``G_s = dY_s^T X_s`` (out, in), optionally plus rows of an embedding.

    `update` and `accumulate` scale the tokens of one factor. Where ``gemm`` keeps it in bf16, that
    rounds by 2^-9 of each token, as a plain backward pass rounds a dY that carries the advantage.
    The update from kept `SequenceGradients` scales sums in float32 and has no such rounding.
    """

    def __init__(
        self,
        x: torch.Tensor,
        dy: torch.Tensor,
        sequences: PackedSequences,
        workspace: Workspace,
        *,
        dtype: torch.dtype,
        lookup: Lookup | None = None,
        gemm: Gemm | None = None,
    ) -> None:
        """Keep what a layer captured.

        Args:
            x, dy: (T, in) and (T, out).
            dtype: of ``main_grad``.
            gemm: None: torch's, and where it does not take these factors.
        """
        taken = gemm is not None and all(gemm.takes(found.dtype, dtype) for found in (x, dy))
        self.gemm = gemm if gemm is not None and taken else TorchGemm()
        self.x = self.gemm.operand(x, dtype)
        self.dy = self.gemm.operand(dy, dtype)
        self.dtype = dtype
        self.sequences = sequences
        self.workspace = workspace
        self.lookup = lookup

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.dy.shape[1], self.x.shape[1]

    @property
    def nbytes(self) -> int:
        lookup = 0 if self.lookup is None else self.lookup.dy.nbytes
        return self.x.nbytes + self.dy.nbytes + lookup

    def materialize(self, *, accumulates: bool) -> SequenceGradients:
        """Form G as it is, in the workspace.

        Args:
            accumulates: products will be with an accumulated gradient, too.
        """
        k = self.sequences.count
        slices = kept_slices(k, accumulates=accumulates)
        stack = self.workspace.take((slices, *self.shape), self.dtype)
        self._form(0, self.shape[0], stack)
        return SequenceGradients(stack, k)

    def products(
        self, units: Sequence[Rows], accumulated: torch.Tensor | None = None
    ) -> list[Products]:
        k, (rows, width) = self.sequences.count, self.shape
        chunk = chunk_rows(units, rows, width)
        row_bytes = (k + 1) * width * self.dtype.itemsize
        block = max(1, self.workspace.block_bytes // (row_bytes * chunk)) * chunk
        found = []
        for low in range(0, rows, block):
            high = min(low + block, rows)
            shape = (k + (accumulated is not None), high - low, width)
            stack = self.workspace.scratch(shape, self.dtype)
            self._form(low, high, stack)
            if accumulated is not None:
                stack[k] = accumulated[low:high]
            found.append(contract(stack, k, chunk))
        return _products(torch.cat(found), units, accumulated, chunk)

    def update(self, parts: Sequence[Part], accumulated: torch.Tensor) -> None:
        segments = []
        for rows, coefficients in parts:
            values = self.sequences.per_token(coefficients).to(self.dtype)
            segments += [_Segment(start, stop, values) for start, stop in rows if start < stop]
            if self.lookup is not None:
                self.lookup.update(rows, accumulated, values)
        for stretch in _stretches(segments):
            self._add(stretch, accumulated)

    def accumulate(
        self, rows: Rows, accumulated: torch.Tensor, coefficients: torch.Tensor
    ) -> torch.Tensor:
        """Update without a lookup; return |what was added|^2 () of this rank, float64."""
        assert self.lookup is None
        per_token = self.sequences.per_token(coefficients).to(self.dtype)
        energy = self.x.new_zeros((), dtype=torch.float64)
        # A block, and dY of its rows, take at most half of the workspace each.
        step = max(1, self.workspace.half // (max(self.x.shape) * self.dtype.itemsize))
        for start, stop in rows:
            for low in range(start, stop, step):
                high = min(low + step, stop)
                part = torch.zeros_like(accumulated[low:high])
                scaled = (self.dy[:, low:high] * per_token[:, None]).to(self.dy.dtype)
                self.gemm.accumulate(scaled, self.x, part)
                del scaled
                accumulated[low:high] += part
                energy += torch.linalg.vector_norm(part, dtype=torch.float64).square()
        return energy

    # ------------------------------------------------------------------ pieces

    def _form(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Form G of these output rows in ``out`` (k or more, stop - start, in)."""
        k = self.sequences.count
        self.gemm.sequence_gradients(self.dy[:, start:stop], self.x, self.sequences, out[:k])
        if self.lookup is not None:
            self.lookup.add_to(out[:k], start, stop, self.sequences)

    def _add(self, stretch: Sequence[_Segment], accumulated: torch.Tensor) -> None:
        """Do the ordinary weight-gradient GEMM over adjacent rows, with scaled tokens."""
        tokens, width = self.x.shape
        low, high = stretch[0].start, stretch[-1].stop
        token_bytes = tokens * self.x.element_size()
        alone = len(stretch) == 1 and width <= high - low
        if alone and width * token_bytes <= self.workspace.half:  # the narrower factor is scaled
            scaled = self.workspace.scratch((tokens, width), self.x.dtype)
            torch.mul(self.x, stretch[0].values[:, None], out=scaled)
            self.gemm.accumulate(self.dy[:, low:high], scaled, accumulated[low:high])
            return
        step = max(1, self.workspace.half // max(1, token_bytes))
        for first in range(low, high, step):
            last = min(first + step, high)
            scaled = self.workspace.scratch((tokens, last - first), self.dy.dtype)
            for segment in stretch:
                start, stop = max(segment.start, first), min(segment.stop, last)
                if start < stop:
                    columns = scaled[:, start - first : stop - first]
                    torch.mul(self.dy[:, start:stop], segment.values[:, None], out=columns)
            self.gemm.accumulate(scaled, self.x, accumulated[first:last])


@dataclass(frozen=True)
class _Segment:
    """Rows of a weight whose tokens are scaled alike."""

    start: int
    stop: int
    values: torch.Tensor  # (T,)


def _stretches(segments: Sequence[_Segment]) -> list[list[_Segment]]:
    """Return segments in the order of their rows, those together that touch."""
    found: list[list[_Segment]] = []
    for segment in sorted(segments, key=lambda segment: segment.start):
        if found and found[-1][-1].stop == segment.start:
            found[-1].append(segment)
        else:
            found.append([segment])
    return found


class SequenceGradients:
    """G (k, out, in) of a weight, in the workspace until its group is solved."""

    nbytes = 0  # what the workspace holds, it counts itself

    def __init__(self, stack: torch.Tensor, count: int) -> None:
        """Keep what `LinearFactors.materialize` formed.

        Args:
            stack: (k, out, in), or (k + 1, out, in) with room for an accumulated gradient where
                k > 1.
            count: k.
        """
        self._stack = stack
        self._count = count

    def products(
        self, units: Sequence[Rows], accumulated: torch.Tensor | None = None
    ) -> list[Products]:
        _, rows, width = self._stack.shape
        chunk = chunk_rows(units, rows, width)
        if accumulated is not None and self._count == 1:  # two dots: no copy, and no GEMM's packing
            (gradient,) = self._stack[:1]
            pairs = [dots(gradient, other, chunk) for other in (gradient, accumulated)]
            return _products(torch.stack(pairs, dim=1)[..., None], units, accumulated, chunk)
        if accumulated is not None:
            self._stack[self._count] = accumulated  # so that one pass gives K and c
        found = contract(self._stack, self._count, chunk)
        return _products(found, units, accumulated, chunk)

    def update(self, parts: Sequence[Part], accumulated: torch.Tensor) -> None:
        for rows, coefficients in parts:
            weights = coefficients.to(self._stack.dtype)
            for start, stop in rows:
                gradients = self._stack[: self._count, start:stop].flatten(1)
                accumulated[start:stop].view(-1).addmv_(gradients.t(), weights)


# --------------------------------------------------------------------------- embeddings
