"""Dominant subspaces of activations and output gradients: pure maths of Intra-PROMA's rule.

For one linear unit and microbatch, X (T, in) is the input, dY (T, out) the output gradient of the
unit losses, and G = dY^T diag(a) X (out, in) the microbatch's policy gradient, a (T,) being each
token's advantage. U_x (in, r) are the r dominant right singular vectors of X, U_y (out, r) those of
dY. What is removed from G is its part inside of them:

    R = U_y U_y^T G U_x U_x^T   (both),   G U_x U_x^T   (input),   U_y U_y^T G   (output)

No (in, in) or (out, out) matrix is formed, and a matrix whose columns are spread over ranks is
treated as the whole one. All work is on the side of the tokens, where every rank can hold
everything. With M either matrix:

- A short M (T <= `DIRECT_TOKENS`) has its Gram matrix M M^T (T, T) summed over ranks; its
  eigenvectors are M's left singular vectors, to rounding. At rank 8 the iteration costs more than
  the Gram matrix below 288 tokens, and takes more collectives.
- A longer one goes through a subspace iteration of `ITERATIONS` steps, V <- orth(M (M^T V)),
  summed over ranks, from a Gaussian sketch that is the same everywhere. It carries
  l = r + max(r, `OVERSAMPLING`) columns, and the angle to the true subspace falls like
  (s_{l+1} / s_r)^(2 q + 1) over singular values s and q steps. Flat spectra, where it falls slowly,
  have no dominant subspace to speak of; what is found there is orthonormal all the same, so that R
  is a true projection. A Rayleigh-Ritz step picks r of the l directions.

Everything is computed in float64, a block of tokens at a time: on data-centre GPUs that is no
slower than float32, and squared singular values would leave float32 half of its digits.
Sources: Halko, Martinsson and Tropp, "Finding structure with randomness" (arXiv:0909.4061),
section 4.5, for the iteration; Intra-PROMA: arXiv:2601.10498v3, which names no formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from proma_megatron.projection.rules.proma import all_finite, masked
from proma_megatron.projection.sizes import (
    ITERATIONS,
    is_direct,
    sketch_width,
)

SEED = 20  # of the sketch
# Directions whose squared singular value is below this, relative to the largest, are rounding noise
# of sums in float64, and absent.
CUTOFF = 1e-12

Sides = Literal["both", "input", "output"]
# Adds up, over the ranks that hold other columns, every one of some tensors of equal shapes there.
Reduce = Callable[[list[torch.Tensor]], list[torch.Tensor]]


class TokenMatrix:
    """X or dY of one unit as this rank holds it: a row for every token that is in a sequence.

    Args:
        matrix: (T or more, columns); rows beyond ``tokens`` are padding.
        columns: half-open ranges of the columns that count.
        sharded: other ranks hold other columns, else all hold the same.
        block_bytes: float64 copies take at most so much at a time, or one row or column.
    """

    def __init__(
        self,
        matrix: torch.Tensor,
        tokens: int,
        columns: Sequence[tuple[int, int]],
        *,
        sharded: bool,
        block_bytes: int,
    ) -> None:
        self.matrix = matrix[:tokens]
        self.columns = columns
        self.width = sum(high - low for low, high in columns)
        self.sharded = sharded
        self.block_bytes = block_bytes

    @property
    def tokens(self) -> int:
        return self.matrix.shape[0]

    def rows(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield blocks of tokens: (first, end, float64 (end - first, n))."""
        step = max(1, self.block_bytes // max(1, 8 * self.width))
        for low in range(0, self.tokens, step):
            high = min(low + step, self.tokens)
            parts = [self.matrix[low:high, start:stop] for start, stop in self.columns]
            block = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            yield low, high, block.double()

    def apply(self, right: torch.Tensor) -> torch.Tensor:
        """Return ``M right`` (T, l), of this rank's columns; right (n, l)."""
        found = right.new_zeros((self.tokens, right.shape[1]))
        if self.width:
            for low, high, block in self.rows():
                torch.mm(block, right, out=found[low:high])
        return found

    def apply_transposed(self, left: torch.Tensor) -> torch.Tensor:
        """Return ``M^T left`` (n, l), this rank's rows of it; left (T, l)."""
        found = left.new_zeros((self.width, left.shape[1]))
        if self.width:
            for low, high, block in self.rows():
                found.addmm_(block.T, left[low:high])
        return found

    def gram(self) -> torch.Tensor:
        """Return ``M M^T`` (T, T), of this rank's columns."""
        step = max(1, self.block_bytes // max(1, 8 * self.tokens))
        found = self.matrix.new_zeros((self.tokens, self.tokens), dtype=torch.float64)
        for start, stop in self.columns:
            for low in range(start, stop, step):
                block = self.matrix[:, low : min(low + step, stop)].double()
                found.addmm_(block, block.T)
        return found


@dataclass(frozen=True)
class Subspace:
    """Dominant right singular vectors U of a matrix M; those that M does not have are 0."""

    basis: torch.Tensor  # (n, r) this rank's rows of U, whose columns are orthonormal over all
    image: torch.Tensor  # (T, r) M U, of the whole M
    finite: torch.Tensor  # () bool: M is; if not, U and M U mean nothing


def dominant(matrices: Sequence[TokenMatrix], rank: int, reduce: Reduce) -> list[Subspace]:
    """Return the dominant subspaces of these matrices, all with the same tokens.

    They go in step, so that ``reduce`` is called once for all of them: once in all where T is
    small, else `ITERATIONS` + 1 times; the same on every rank, for only shapes decide. A matrix
    that is not finite raises nothing, and does nothing to the others.
    """
    if not matrices:
        return []
    if is_direct(matrices[0].tokens, rank):
        return _direct(matrices, rank, reduce)
    return _iterated(matrices, rank, reduce)


def _direct(matrices: Sequence[TokenMatrix], rank: int, reduce: Reduce) -> list[Subspace]:
    grams = torch.stack(_whole([m.gram() for m in matrices], matrices, reduce))
    finite = all_finite(grams, 2)
    grams.masked_fill_(~finite[:, None, None], 0.0)  # in place: they are the largest thing here
    sizes, scale, left = _ritz(grams, rank)
    return [
        # M^T v = s u, and M u = s v.
        Subspace(m.apply_transposed(left[i] * scale[i]), left[i] * sizes[i], finite[i])
        for i, m in enumerate(matrices)
    ]


def _iterated(matrices: Sequence[TokenMatrix], rank: int, reduce: Reduce) -> list[Subspace]:
    tokens, width = matrices[0].tokens, sketch_width(rank)
    basis = _sketch(tokens, width, matrices[0].matrix.device).expand(len(matrices), -1, -1)
    right: list[torch.Tensor] = []
    images = basis
    finite = all_finite(basis, 2)
    for step in range(ITERATIONS + 1):
        right = [m.apply_transposed(v) for m, v in zip(matrices, basis, strict=True)]
        parts = [m.apply(b) for m, b in zip(matrices, right, strict=True)]
        images = torch.stack(_whole(parts, matrices, reduce))
        finite = finite & all_finite(images, 2)
        images = masked(images, finite)
        if step < ITERATIONS:
            basis, _ = torch.linalg.qr(images)
    # V^T M M^T V is the Gram matrix of B = M^T V; B Q / s has orthonormal columns.
    small = basis.mT @ images
    small = (small + small.mT) / 2
    finite = finite & all_finite(small, 2)
    _, scale, rotation = _ritz(masked(small, finite), rank)
    rotation = rotation * scale[:, None, :]
    return [
        Subspace(b @ q, image @ q, good)
        for b, q, image, good in zip(right, rotation, images, finite, strict=True)
    ]


@lru_cache(maxsize=1)  # all layers of a microbatch begin with the same
def _sketch(tokens: int, width: int, device: torch.device) -> torch.Tensor:
    """Return (T, l) normal numbers, made on the CPU: a seed then means the same for all devices."""
    generator = torch.Generator().manual_seed(SEED)
    found = torch.randn((tokens, width), generator=generator, dtype=torch.float64)
    # The host waits for copies of pageable memory.
    return found if device.type == "cpu" else found.pin_memory().to(device, non_blocking=True)


def _ritz(grams: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return first eigenpairs of Gram matrices (m, l, l): s (m, r), 1/s (m, r), vectors (m, l, r).

    s and 1/s are 0 where nothing but rounding is left.
    """
    values, vectors = torch.linalg.eigh(grams)
    values, vectors = values[:, -rank:].flip(-1), vectors[:, :, -rank:].flip(-1)
    there = values > CUTOFF * values[:, :1].clamp(min=0)
    sizes = torch.where(there, values, 0.0).sqrt()
    return sizes, torch.where(there, 1 / torch.where(there, sizes, 1.0), 0.0), vectors


def _whole(
    parts: list[torch.Tensor], matrices: Sequence[TokenMatrix], reduce: Reduce
) -> list[torch.Tensor]:
    """Add up the parts of sharded matrices over ranks; return the others as they are."""
    shared = [part for part, m in zip(parts, matrices, strict=True) if m.sharded]
    summed = iter(reduce(shared) if shared else [])
    return [next(summed) if m.sharded else part for part, m in zip(parts, matrices, strict=True)]


# --------------------------------------------------------------------------- what is removed


@dataclass(frozen=True)
class Removal:
    """R = left @ right on this rank's entries, and its size."""

    left: torch.Tensor  # (out, r)
    right: torch.Tensor  # (r, in)
    square: torch.Tensor  # () |R|^2
    partial: bool  # the square is of this rank's entries alone


def removal(
    sides: Sides,
    x: TokenMatrix,
    dy: TokenMatrix,
    inside: Subspace | None,
    outside: Subspace | None,
    per_token: torch.Tensor,
) -> Removal:
    """Return the part of G = dY^T diag(a) X that lies in the dominant subspaces.

    Args:
        inside: that of X; None for the side "output".
        outside: that of dY; None for the side "input".
        per_token: a (T,) float64.
    """
    weights = per_token[: x.tokens, None]
    if sides == "input":
        assert inside is not None
        left = dy.apply_transposed(weights * inside.image)
        return Removal(left, inside.basis.T, left.square().sum(), dy.sharded)
    assert outside is not None
    if sides == "output":
        right = x.apply_transposed(weights * outside.image).T
        return Removal(outside.basis, right, right.square().sum(), x.sharded)
    assert inside is not None
    core = outside.image.T @ (weights * inside.image)  # U_y^T G U_x (r, r), on every rank
    return Removal(outside.basis @ core, inside.basis.T, core.square().sum(), False)
