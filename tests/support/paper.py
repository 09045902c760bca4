"""The rules as written down, on vectors and matrices of the parameters' full dimension.

Sources: PROMA (arXiv:2601.10498), figures 1 and 3 and section 3, ridge from its published code;
ISOPO (arXiv:2512.23353) and its published code; Intra-PROMA as docs/guide/algorithms.md has it.
"""

from __future__ import annotations

import torch

from proma_megatron.config.objective import ProjectionConfig


def complement(
    accumulated: torch.Tensor,
    sequence_gradients: torch.Tensor,
    policy_gradient: torch.Tensor,
    projection: ProjectionConfig,
) -> torch.Tensor:
    """Figure 1's ``complemented_acc_grad`` with section 3's clamp, and shrinkage.

    Args:
        accumulated: (d,).
        sequence_gradients: (d, k).
        policy_gradient: (d,).
    """
    removed = accumulated - project_to_complement(projection.rule, accumulated, sequence_gradients)
    if projection.bound is not None:
        limit = projection.bound * policy_gradient.norm()
        if removed.norm() > limit:
            removed = removed * limit / removed.norm()
    return accumulated - projection.shrinkage * removed


def project_to_complement(
    rule: str, accumulated: torch.Tensor, sequence_gradients: torch.Tensor
) -> torch.Tensor:
    """``accumulated`` (d,) without its part in the span of ``sequence_gradients`` (d, k)."""
    norms = sequence_gradients.norm(dim=0)
    directions = sequence_gradients[:, norms > 0] / norms[norms > 0]
    if not directions.shape[1]:
        return accumulated
    if rule == "exact":  # figure 3, v1, with a rank cutoff where sequences depend on each other
        basis, sizes, _ = torch.linalg.svd(directions, full_matrices=False)
        basis = basis[:, sizes > 1e-6 * sizes.max()]
        return accumulated - basis @ (basis.T @ accumulated)
    if rule == "ridge":  # argmin_b |A - U b|^2 + 0.01 |b|^2, as an ordinary least-squares problem
        k = directions.shape[1]
        tall = torch.cat([directions, 0.1 * torch.eye(k, dtype=torch.float64)])
        target = torch.cat([accumulated, torch.zeros(k, dtype=torch.float64)])
        return accumulated - directions @ torch.linalg.lstsq(tall, target[:, None]).solution[:, 0]
    assert rule == "iterative"  # figure 3, v2
    for _ in range(2):
        for u in directions.T:
            accumulated = accumulated - torch.dot(accumulated, u) * u
    return accumulated


def isopo_advantages(
    rule: str, sequence_gradients: torch.Tensor, advantages: torch.Tensor, regularization: float
) -> torch.Tensor:
    """ISOPO's transformed advantages (k,), from ``sequence_gradients`` (d, k) themselves."""
    k = len(advantages)
    mean = float(sequence_gradients.square().sum()) / k
    if mean == 0:
        return advantages
    reg = regularization * mean
    if rule == "norm":
        return advantages / (1 + sequence_gradients.square().sum(dim=0) / reg).sqrt()
    assert rule == "kernel"  # V diag(reg / (D + reg)) V^T = reg (K + reg I)^-1
    damped = sequence_gradients.T @ sequence_gradients + reg * torch.eye(k, dtype=torch.float64)
    return reg * torch.linalg.solve(damped, advantages)


def dominant_projector(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """U U^T (n, n) of the ``rank`` dominant right singular vectors of ``matrix`` (T, n)."""
    _, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    basis = right[:rank][sizes[:rank] > 1e-6 * sizes[0]]
    return basis.T @ basis


def deflated(
    x: torch.Tensor, dy: torch.Tensor, per_token: torch.Tensor, projection: ProjectionConfig
) -> torch.Tensor:
    """Intra-PROMA's ``G - shrinkage * clamp(R)`` (out, in).

    Args:
        x: (T, in).
        dy: (T, out), of unit losses.
        per_token: (T,) each token's advantage.
    """
    gradient = dy.T @ torch.diag(per_token) @ x
    removed = gradient
    if projection.sides != "input":
        removed = dominant_projector(dy, projection.rank) @ removed
    if projection.sides != "output":
        removed = removed @ dominant_projector(x, projection.rank)
    if projection.bound is not None:
        limit = projection.bound * gradient.norm()
        if removed.norm() > limit:
            removed = removed * limit / removed.norm()
    return gradient - projection.shrinkage * removed
