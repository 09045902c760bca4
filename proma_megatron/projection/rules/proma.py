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

All functions take leading batch axes (units that are solved together) and float64. A unit whose
figures are not finite, those that it is given or those that come out, is left alone: nothing is
removed, P is added, and `Outcome.finite` says so. The other units of the batch don't notice.
A Gram matrix is decomposed by `torch.linalg.eigh` on a CPU; where the host would wait for its
outcome, by a factorization of a fixed number of steps (`cholesky`) that finds the same span.
Source: PROMA (arXiv:2601.10498), figures 1 and 3 and section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from proma_megatron.projection import host_sync
from proma_megatron.projection.rules.cholesky import pivoted_factor, reduced

Rule = Literal["exact", "iterative", "ridge"]

RIDGE = 1e-2  # relative to unit-norm sequence gradients, as in the published code
SWEEPS = 2  # of the iterative projection, as in figure 3


@dataclass(frozen=True)
class Outcome:
    """What one microbatch does to each unit of a batch of units, in figures."""

    removed: torch.Tensor  # (...,) squared norm of what is taken out of A, after the clamp
    policy: torch.Tensor  # (...,) |P|^2, P = G a
    clamped: torch.Tensor  # (...,) bool: the bound made the removed part smaller
    residual: torch.Tensor  # (...,) max_s |<A - G beta, u_s>| before the clamp, u_s = G_s / |G_s|
    finite: torch.Tensor  # (...,) bool: all figures of it are; if not, nothing was changed


@dataclass(frozen=True, kw_only=True)
class Solution(Outcome):
    coefficients: torch.Tensor  # (..., k): A gains sum_s coefficients_s * G_s


@dataclass(frozen=True, kw_only=True)
class VectorSolution(Outcome):
    removed_part: torch.Tensor  # (..., n): A loses it, and gains P


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
    """Return the coefficients of the update for one microbatch.

    Args:
        gram: K (..., k, k), symmetric positive semidefinite.
        overlap: c (..., k).
        advantages: a (k,).
        shrinkage: eta in [0, 1].
        bound: the removed part has norm at most ``bound * |P|``; None leaves it as it is.
        cutoff: eigenvalues of the normalized Gram below ``cutoff`` times the largest count as 0;
            depends on the precision that K was formed in.
    """
    finite = _sums_are_finite(gram, overlap)
    gram, overlap = masked(gram, finite), masked(overlap, finite)
    spectrum = _decomposed(gram, cutoff)
    if rule == "exact":
        beta = spectrum.pseudo_inverse(overlap)
    elif rule == "ridge":
        beta = _ridge(gram, overlap, spectrum.scale)
    else:
        beta = _iterative(gram, overlap)
    removed = spectrum.square_norm(beta)
    policy = spectrum.square_norm(advantages.expand_as(beta))
    factor = clamp_factor(removed, policy, bound) * shrinkage
    coefficients = advantages - factor[..., None] * beta
    finite = finite & all_finite(coefficients, 1) & (removed + policy).isfinite()
    return Solution(
        coefficients=torch.where(finite[..., None], coefficients, advantages),
        removed=removed * factor**2,
        policy=policy,
        clamped=factor < shrinkage,
        residual=_residual(overlap - _apply(gram, beta), spectrum.scale),
        finite=finite,
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
) -> VectorSolution:
    """Solve as `solve` for units whose sequence gradients are at hand.

    Args:
        gradients: G^T (..., k, n).
        accumulated: A (..., n).
        cutoff: as in `solve`: a singular value of normalized G counts as 0 below its root.
    """
    gram, overlap = gradients @ gradients.mT, _apply(gradients, accumulated)
    # Every entry of both has a part in them: 0 times what is not finite is not either.
    finite = _sums_are_finite(gram, overlap) & accumulated.sum(dim=-1).isfinite()
    gradients, accumulated = masked(gradients, finite), masked(accumulated, finite)
    gram, overlap = masked(gram, finite), masked(overlap, finite)
    if rule == "exact":
        normalized = _inverse_norms(gram)[..., None] * gradients
        inside = _project(normalized, accumulated, cutoff**0.5)
    else:  # their divisors are bounded from below: K is good enough
        beta = (
            _ridge(gram, overlap, _inverse_norms(gram))
            if rule == "ridge"
            else _iterative(gram, overlap)
        )
        inside = _apply(gradients.mT, beta)
    square = inside.square().sum(dim=-1)
    policy = _apply(gradients.mT, advantages.expand(gram.shape[:-1])).square().sum(dim=-1)
    factor = clamp_factor(square, policy, bound) * shrinkage
    left = _apply(gradients, accumulated - inside)
    finite = finite & all_finite(inside, 1) & (square + policy).isfinite()
    return VectorSolution(
        removed_part=masked(factor[..., None] * inside, finite),
        removed=square * factor**2,
        policy=policy,
        clamped=factor < shrinkage,
        residual=_residual(left, _inverse_norms(gram)),
        finite=finite,
    )


def _project(rows: torch.Tensor, vector: torch.Tensor, cutoff: float) -> torch.Tensor:
    """Return the part of ``vector`` (..., n) in the span of ``rows`` (..., m, n).

    Singular values of the rows below ``cutoff`` times the largest count as 0. Eigenvectors of the
    rows' Gram matrix turn them into nearly orthogonal ones, whose lengths are the singular values
    to full precision; made unit vectors, those have a Gram matrix of good condition. Two small
    decompositions for all units of a batch, where an SVD of (n, m) is one after the other.
    """
    basis, kept = _nearly_orthonormal(rows, cutoff)
    gram = basis @ basis.mT + torch.diag_embed((~kept).to(basis.dtype))
    # Without a check for singular matrices, for which the host would wait: these are near identity.
    inside = torch.linalg.solve_ex(gram, _apply(basis, vector)[..., None]).result[..., 0]
    return _apply(basis.mT, inside)


def _nearly_orthonormal(rows: torch.Tensor, cutoff: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows (..., m, n) of the same span, and which exist (..., m); the others are 0."""
    gram = rows @ rows.mT
    if host_sync.asynchronous(rows.device):
        factor = pivoted_factor(gram, cutoff**2)
        inner, absent = reduced(factor)
        # The small matrix first: whatever its error, its product with rows stays in their span.
        return torch.linalg.solve_ex(inner, factor.mT).result @ rows, ~absent
    directions = torch.linalg.eigh(gram).eigenvectors.mT @ rows
    sizes = torch.linalg.vector_norm(directions, dim=-1)
    kept = sizes > cutoff * sizes.amax(dim=-1, keepdim=True)
    return directions * torch.where(kept, 1 / torch.where(kept, sizes, 1.0), 0.0)[..., None], kept


def clamp_factor(removed: torch.Tensor, policy: torch.Tensor, bound: float | None) -> torch.Tensor:
    """Return what scales the removed part down to ``bound * |P|``, (...,) in [0, 1].

    Args:
        removed, policy: squared norms (...,), of the removed part and of P.
    """
    if bound is None:
        return torch.ones_like(removed)
    limit, norm = bound * policy.sqrt(), removed.sqrt()
    return torch.where(norm > limit, limit / norm.clamp(min=torch.finfo(norm.dtype).tiny), 1.0)


def all_finite(values: torch.Tensor, axes: int) -> torch.Tensor:
    """Return (...,) bool: whether everything along so many last axes is finite."""
    rows = values.flatten(-axes)
    if not rows.shape[-1]:
        return torch.ones(rows.shape[:-1], dtype=torch.bool, device=values.device)
    # Both are NaN where anything is; `isfinite` of all would make copies of all.
    least, most = rows.aminmax(dim=-1)
    return least.isfinite() & most.isfinite()


def _sums_are_finite(gram: torch.Tensor, overlap: torch.Tensor) -> torch.Tensor:
    """Look at both as `all_finite`, (...,) bool: sums of float32 add up without overflow."""
    return (gram.sum(dim=(-2, -1)) + overlap.sum(dim=-1)).isfinite()


def masked(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return ``values`` (..., *rest) where ``kept`` (...,), else 0: eigh and solve refuse NaN."""
    return torch.where(kept.reshape(*kept.shape, *[1] * (values.dim() - kept.dim())), values, 0.0)


def _inverse_norms(gram: torch.Tensor) -> torch.Tensor:
    """Return D = diag(K_ss^-1/2), 0 for a sequence without gradient."""
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    return torch.where(norms > 0, 1 / norms, 0.0)


def _apply(gram: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return (gram @ vector[..., None])[..., 0]


def _residual(overlaps: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (overlaps * scale).abs().amax(dim=-1)


class _Decomposition(Protocol):
    """The normalized Gram matrix D K D without its directions at rounding noise.

    Normalizing first keeps short sequences above the cut.
    """

    scale: torch.Tensor  # (..., k) D

    def pseudo_inverse(self, overlap: torch.Tensor) -> torch.Tensor:
        """Return D (D K D)^+ D c."""
        ...

    def square_norm(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Return |G v|^2 = v^T K v as a sum of squares.

        The quadratic form itself leaves the root of the rounding error where sequences cancel, such
        as equal ones whose advantages sum to 0; the bound would let that much be removed.
        """
        ...


def _decomposed(gram: torch.Tensor, cutoff: float) -> _Decomposition:
    scale = _inverse_norms(gram)
    normalized = scale[..., :, None] * gram * scale[..., None, :]
    if host_sync.asynchronous(gram.device):
        return _Triangular(scale, pivoted_factor(normalized, cutoff))
    values, vectors = torch.linalg.eigh(normalized)
    return _Spectrum(scale, torch.where(values > cutoff * values[..., -1:], values, 0.0), vectors)


@dataclass
class _Spectrum:
    """By eigenvalues, those at rounding noise set to 0."""

    scale: torch.Tensor
    values: torch.Tensor  # (..., k)
    vectors: torch.Tensor  # (..., k, k)

    def pseudo_inverse(self, overlap: torch.Tensor) -> torch.Tensor:
        inverse = torch.where(self.values > 0, 1 / torch.where(self.values > 0, self.values, 1), 0)
        rotated = _apply(self.vectors.mT, self.scale * overlap)
        return self.scale * _apply(self.vectors, inverse * rotated)

    def square_norm(self, coefficients: torch.Tensor) -> torch.Tensor:
        rotated = _apply(self.vectors.mT, _norms(self.scale) * coefficients)
        return (self.values * rotated.square()).sum(dim=-1)


@dataclass
class _Triangular:
    """By a factor L with D K D = L L^T, whose columns from the rank on are 0."""

    scale: torch.Tensor
    factor: torch.Tensor  # (..., k, k) L

    def pseudo_inverse(self, overlap: torch.Tensor) -> torch.Tensor:
        """Solve by (L L^T)^+ = L (L^T L)^-2 L^T."""
        inner, _ = reduced(self.factor)
        found = _apply(self.factor.mT, self.scale * overlap)[..., None]
        for _ in range(2):
            found = torch.linalg.solve_ex(inner, found).result
        return self.scale * (self.factor @ found)[..., 0]

    def square_norm(self, coefficients: torch.Tensor) -> torch.Tensor:
        return square_norm(self.factor, _norms(self.scale) * coefficients)


def square_norm(factor: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return |G w|^2 (...,) from a factor of K = L L^T (..., k, k) and w (..., k)."""
    return _apply(factor.mT, weights).square().sum(dim=-1)


def _norms(scale: torch.Tensor) -> torch.Tensor:
    """Return D^-1, 0 where D is."""
    return torch.where(scale > 0, 1 / torch.where(scale > 0, scale, 1), 0)


def _ridge(gram: torch.Tensor, overlap: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return D (D K D + ridge I)^-1 D c."""
    normalized = scale[..., :, None] * gram * scale[..., None, :]
    damped = normalized + RIDGE * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    solved = torch.linalg.solve_ex(damped, (scale * overlap)[..., None]).result
    return scale * solved[..., 0]


def _iterative(gram: torch.Tensor, overlap: torch.Tensor) -> torch.Tensor:
    """Sweep, taking out one sequence after the other (figure 3, v2), in coefficients."""
    beta = torch.zeros_like(overlap)
    rest = overlap.clone()
    for _ in range(SWEEPS):
        for s in range(overlap.shape[-1]):
            square = gram[..., s, s]
            step = torch.where(square > 0, rest[..., s] / torch.where(square > 0, square, 1.0), 0.0)
            beta[..., s] += step
            rest = rest - step[..., None] * gram[..., :, s]
    return beta
