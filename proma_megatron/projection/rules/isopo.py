"""ISOPO's transformation of advantages: a pure function of (K, a); known nowhere else.

For one unit and microbatch, K = G^T G (k, k) is the Gram matrix of the sequence gradients of the
unit losses and a (k,) the advantages. Nothing that has been accumulated is changed:

    A  <-  A + G a'

- kernel: sequences act on each other. With K = V D V^T, ``a' = V diag(reg / (D + reg)) V^T a``:
  directions in which sequences agree are damped, others left as they are.
- norm: each sequence by itself, ``a'_s = a_s / sqrt(1 + K_ss / reg)``: long gradients are scaled
  down to one length, short ones left. For reg -> 0 it tends to ``sqrt(reg) a_s / |G_s|``.

``reg = regularization * tr(K) / k``, the mean eigenvalue of this microbatch's K. The published code
keeps a running mean of it over microbatches (decay 0.9); the microbatch's own needs no state, so a
step does not depend on those before it and resumes as it was.
Source: ISOPO (arXiv:2512.23353) and its published code, nilin/isopo.
"""

from __future__ import annotations

from typing import Literal

import torch

from proma_megatron.projection import host_sync
from proma_megatron.projection.rules.cholesky import pivoted_factor
from proma_megatron.projection.rules.proma import Solution, all_finite, masked, square_norm

Kind = Literal["kernel", "norm"]

ROUNDING = 1e-15  # relative to the largest eigenvalue of a K, what float64 leaves of a 0


def precondition(
    kind: Kind, gram: torch.Tensor, advantages: torch.Tensor, *, regularization: float
) -> Solution:
    """Return coefficients a' of the update, for units that are solved together.

    ``removed`` is |G (a - a')|^2, what the transformation changed, next to ``policy`` = |G a|^2;
    nothing is clamped and there is no residual. Of a unit that is not finite, a' = a.

    Args:
        gram: K (..., k, k) float64, symmetric positive semidefinite. Where it is 0, a' = a.
        advantages: a (k,) float64.
        regularization: positive, relative to the mean eigenvalue.
    """
    finite = all_finite(gram, 2)
    gram = masked(gram, finite)
    diagonal = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0)
    reg = regularization * diagonal.mean(dim=-1, keepdim=True)
    form = _Factored(gram) if host_sync.asynchronous(gram.device) else _Spectral(gram)
    plain = advantages.expand(diagonal.shape)
    if kind == "kernel":
        coefficients = form.damped(reg, plain)
    else:
        ratio = torch.where(reg > 0, diagonal / torch.where(reg > 0, reg, 1.0), 0.0)
        coefficients = advantages / (1 + ratio).sqrt()
    policy = form.square(plain)
    removed = form.square(advantages - coefficients)
    finite = finite & all_finite(coefficients, 1) & (removed + policy).isfinite()
    return Solution(
        coefficients=torch.where(finite[..., None], coefficients, advantages),
        removed=removed,
        policy=policy,
        clamped=torch.zeros_like(policy, dtype=torch.bool),
        residual=torch.zeros_like(policy),
        finite=finite,
    )


class _Spectral:
    """K (..., k, k) by its eigenvalues and eigenvectors."""

    def __init__(self, gram: torch.Tensor) -> None:
        values, self.vectors = torch.linalg.eigh(gram)
        self.values = values.clamp(min=0)  # below it only by rounding

    def damped(self, reg: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return ``reg (K + reg I)^-1 w`` for w (..., k); w itself where reg (..., 1) is 0."""
        rotated = _apply(self.vectors.mT, weights)
        kept = torch.where(reg > 0, reg / torch.where(reg > 0, self.values + reg, 1.0), 1.0)
        return _apply(self.vectors, kept * rotated)

    def square(self, weights: torch.Tensor) -> torch.Tensor:
        """Return |G w|^2 as a sum of squares, which keeps its digits where sequences cancel."""
        return (self.values * _apply(self.vectors.mT, weights).square()).sum(dim=-1)


class _Factored:
    """The same where the host would wait for eigenvalues."""

    def __init__(self, gram: torch.Tensor) -> None:
        self.gram = gram
        self.factor = pivoted_factor(gram, ROUNDING)

    def damped(self, reg: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        relative = self.gram / torch.where(reg > 0, reg, 1.0)[..., None]
        one = torch.eye(self.gram.shape[-1], dtype=self.gram.dtype, device=self.gram.device)
        return torch.linalg.solve_ex(relative + one, weights[..., None]).result[..., 0]

    def square(self, weights: torch.Tensor) -> torch.Tensor:
        return square_norm(self.factor, weights)


def _apply(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return (matrix @ vector[..., None])[..., 0]
