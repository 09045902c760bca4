"""A rank-revealing factor of Gram matrices in a fixed number of operations, for devices.

`torch.linalg.eigh` reads its outcome on the host, which waits for the GPU. Cholesky's factorization
with pivots takes k steps of eight small kernels whatever the matrix, 64 at k = 8; cyclic Jacobi
rotations to float64's precision would be ten kernels for each of (k - 1) rounds of some seven
sweeps, 490. What both say about a Gram matrix, the span of vectors that are independent and their
lengths, is the same up to rounding; only directions that a cutoff all but removes may differ,
within a few times the cutoff.
"""

from __future__ import annotations

import torch


def pivoted_factor(gram: torch.Tensor, cutoff: float) -> torch.Tensor:
    """Return L (..., k, k) with ``L L^T = gram`` but for directions at rounding noise.

    Column i belongs to the pivot of step i, the vector with the longest rest outside the span of
    those before it. Columns from the rank on are 0: nothing is left there that is longer, squared,
    than ``cutoff`` times the largest eigenvalue.

    Args:
        gram: (..., k, k) positive semidefinite, finite.
    """
    k = gram.shape[-1]
    # Relative to the largest entry, whose square might be infinite.
    peak = gram.diagonal(dim1=-2, dim2=-1).amax(dim=-1)[..., None, None]
    rest, columns = gram / torch.where(peak > 0, peak, 1.0), []
    # An upper bound of the largest eigenvalue, at most k^(1/4) times it.
    largest = torch.linalg.matrix_norm(rest @ rest, keepdim=True).sqrt()
    least = cutoff * largest
    for _ in range(k):
        pivot, place = rest.diagonal(dim1=-2, dim2=-1).max(dim=-1, keepdim=True)
        column = rest.gather(-1, place[..., None].expand(*rest.shape[:-1], 1))
        size = torch.where(pivot[..., None] > least, pivot[..., None], torch.inf)
        column = column / size.sqrt()
        rest = rest - column @ column.mT
        columns.append(column)
    return torch.cat(columns, dim=-1) * peak.clamp(min=0).sqrt()


def reduced(factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``L^T L`` (..., k, k) of a pivoted factor, 1 for columns of 0, and which those are.

    It has the eigenvalues of ``L L^T`` that are not 0, and can be solved with.
    """
    inner = factor.mT @ factor
    absent = inner.diagonal(dim1=-2, dim2=-1) == 0
    return inner + torch.diag_embed(absent.to(inner.dtype)), absent
