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

from proma_megatron.projection.rules import Solution, all_finite, masked

Kind = Literal["kernel", "norm"]


def precondition(
    kind: Kind, gram: torch.Tensor, advantages: torch.Tensor, *, regularization: float
) -> Solution:
    """Coefficients a' of the update, for units that are solved together.

    ``removed`` is |G (a - a')|^2, what the transformation changed, next to ``policy`` = |G a|^2;
    nothing is clamped and there is no residual. Of a unit that is not finite, a' = a.

    Args:
        gram: K (..., k, k) float64, symmetric positive semidefinite. Where it is 0, a' = a.
        advantages: a (k,) float64.
        regularization: positive, relative to the mean eigenvalue.
    """
    finite = all_finite(gram, 2)
    gram = masked(gram, finite)
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0)  # below it only by rounding
    diagonal = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0)
    reg = regularization * diagonal.mean(dim=-1, keepdim=True)
    if kind == "kernel":
        rotated = _apply(vectors.mT, advantages.expand(diagonal.shape))
        kept = torch.where(reg > 0, reg / torch.where(reg > 0, values + reg, 1.0), 1.0)
        coefficients = _apply(vectors, kept * rotated)
    else:
        ratio = torch.where(reg > 0, diagonal / torch.where(reg > 0, reg, 1.0), 0.0)
        coefficients = advantages / (1 + ratio).sqrt()
    policy = _square(values, vectors, advantages.expand(diagonal.shape))
    removed = _square(values, vectors, advantages - coefficients)
    finite = finite & all_finite(coefficients, 1) & (removed + policy).isfinite()
    return Solution(
        coefficients=torch.where(finite[..., None], coefficients, advantages),
        removed=removed,
        policy=policy,
        clamped=torch.zeros_like(policy, dtype=torch.bool),
        residual=torch.zeros_like(policy),
        finite=finite,
    )


def _apply(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _square(values: torch.Tensor, vectors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """|G w|^2 as a sum of squares, which keeps its digits where sequences cancel."""
    return (values * _apply(vectors.mT, weights).square()).sum(dim=-1)
