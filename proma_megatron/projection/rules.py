"""The projection rules: pure functions of (K, c, a), or of (G, A, a); known nowhere else.

For one unit and microbatch, G (d, k) holds the sequence gradients of the unit losses, A (d,) the
gradient accumulated so far, a (k,) the advantages. With ``K = G^T G`` and ``c = G^T A``, a
projection onto span(G) is ``G beta`` for a beta that these k + k^2 numbers determine, so the
parameter dimension never enters a solve:

    A  <-  A - eta * clamp(G beta) + G a  =  A + G (a - eta * scale * beta)

That is `solve`, for weights, of which no rank holds the whole. K has G's condition number squared,
so directions that are nearly dependent cost digits. Norm weights and biases are short enough to be
whole on every rank, and there a microbatch may have nearly as many sequences as the vector has
entries: `solve_vectors` takes G itself.

All functions take leading batch axes (units that are solved together) and float64.
Source: PROMA (arXiv:2601.10498), figures 1 and 3 and section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

Rule = Literal["exact", "iterative", "ridge"]

RIDGE = 1e-2  # relative to unit-norm sequence gradients, as in the published code
SWEEPS = 2  # of the iterative projection, as in figure 3


@dataclass(frozen=True)
class Solution:
    """What one microbatch does to each unit of a batch of units."""

    coefficients: torch.Tensor  # (..., k): A gains sum_s coefficients_s * G_s
    removed: torch.Tensor  # (...,) squared norm of what is taken out of A, after the clamp
    policy: torch.Tensor  # (...,) |P|^2, P = G a
    clamped: torch.Tensor  # (...,) bool: the bound made the removed part smaller
    residual: torch.Tensor  # (...,) max_s |<A - G beta, u_s>| before the clamp, u_s = G_s / |G_s|


def solve(
    rule: Rule,
    gram: torch.Tensor,
    overlap: torch.Tensor,
    advantages: torch.Tensor,
    *,
    shrinkage: float,
    bound: float | None,
    cutoff: float,
) -> Solution:
    """Coefficients of the update for one microbatch.

    Args:
        gram: K (..., k, k), symmetric positive semidefinite.
        overlap: c (..., k).
        advantages: a (k,).
        shrinkage: eta in [0, 1].
        bound: the removed part has norm at most ``bound * |P|``; None leaves it as it is.
        cutoff: eigenvalues of the normalized Gram below ``cutoff`` times the largest count as 0;
            depends on the precision that K was formed in.
    """
    scale = _inverse_norms(gram)
    if rule == "exact":
        beta = _exact(gram, overlap, scale, cutoff)
    elif rule == "ridge":
        beta = _ridge(gram, overlap, scale)
    else:
        beta = _iterative(gram, overlap)
    removed = _quadratic(gram, beta)
    policy = _quadratic(gram, advantages.expand_as(beta))
    residual = ((overlap - _apply(gram, beta)) * scale).abs().amax(dim=-1)
    factor = _clamp(removed, policy, bound) * shrinkage
    return Solution(
        coefficients=advantages - factor[..., None] * beta,
        removed=removed * factor**2,
        policy=policy,
        clamped=factor < shrinkage,
        residual=residual,
    )


def solve_vectors(
    rule: Rule,
    gradients: torch.Tensor,
    accumulated: torch.Tensor,
    advantages: torch.Tensor,
    *,
    shrinkage: float,
    bound: float | None,
    cutoff: float,
) -> tuple[torch.Tensor, Solution]:
    """The same for units whose sequence gradients are at hand.

    Args:
        gradients: G^T (..., k, n).
        accumulated: A (..., n).
        cutoff: as in `solve`; a singular value of normalized G counts as 0 below its root.

    Returns:
        What is to be taken out of A (..., n), and the same `Solution` as `solve`'s but for the
        digits that K loses.
    """
    gram = gradients @ gradients.mT
    overlap = _apply(gradients, accumulated)
    solution = solve(
        rule, gram, overlap, advantages, shrinkage=shrinkage, bound=bound, cutoff=cutoff
    )
    if rule != "exact":  # their divisors are bounded from below: K is good enough
        removed = _apply(gradients.mT, advantages - solution.coefficients)
        return removed, solution
    scale = _inverse_norms(gram)
    basis, sizes, _ = torch.linalg.svd((scale[..., None] * gradients).mT, full_matrices=False)
    basis = basis * (sizes > cutoff**0.5 * sizes[..., :1])[..., None, :]
    inside = _apply(basis, _apply(basis.mT, accumulated))
    square = inside.square().sum(dim=-1)
    factor = _clamp(square, solution.policy, bound) * shrinkage
    return factor[..., None] * inside, replace(
        solution,
        removed=square * factor**2,
        clamped=factor < shrinkage,
        residual=(_apply(gradients, accumulated - inside) * scale).abs().amax(dim=-1),
    )


def _clamp(removed: torch.Tensor, policy: torch.Tensor, bound: float | None) -> torch.Tensor:
    """What scales the removed part down to ``bound * |P|``; from squared norms (...,)."""
    if bound is None:
        return torch.ones_like(removed)
    limit, norm = bound * policy.sqrt(), removed.sqrt()
    return torch.where(norm > limit, limit / norm.clamp(min=torch.finfo(norm.dtype).tiny), 1.0)


def _inverse_norms(gram: torch.Tensor) -> torch.Tensor:
    """D = diag(K_ss^-1/2), 0 for a sequence without gradient."""
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    return torch.where(norms > 0, 1 / norms, 0.0)


def _apply(gram: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return (gram @ vector[..., None])[..., 0]


def _quadratic(gram: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """v^T K v, which rounding may push below 0."""
    return (vector * _apply(gram, vector)).sum(dim=-1).clamp(min=0)


def _exact(
    gram: torch.Tensor, overlap: torch.Tensor, scale: torch.Tensor, cutoff: float
) -> torch.Tensor:
    """D (D K D)^+ D c: normalizing first keeps short sequences above the cut."""
    normalized = scale[..., :, None] * gram * scale[..., None, :]
    values, vectors = torch.linalg.eigh(normalized)
    largest = values[..., -1:]
    kept = values > cutoff * largest
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    rotated = (vectors.mT @ (scale * overlap)[..., None])[..., 0]
    return scale * (vectors @ (inverse * rotated)[..., None])[..., 0]


def _ridge(gram: torch.Tensor, overlap: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """D (D K D + ridge I)^-1 D c."""
    normalized = scale[..., :, None] * gram * scale[..., None, :]
    damped = normalized + RIDGE * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return scale * torch.linalg.solve(damped, (scale * overlap)[..., None])[..., 0]


def _iterative(gram: torch.Tensor, overlap: torch.Tensor) -> torch.Tensor:
    """Sweeps that take out one sequence after the other (figure 3, v2), in coefficients."""
    beta = torch.zeros_like(overlap)
    rest = overlap.clone()
    for _ in range(SWEEPS):
        for s in range(overlap.shape[-1]):
            square = gram[..., s, s]
            step = torch.where(square > 0, rest[..., s] / torch.where(square > 0, square, 1.0), 0.0)
            beta[..., s] += step
            rest = rest - step[..., None] * gram[..., :, s]
    return beta
