"""The projection as the paper writes it, on vectors of the parameters' full dimension.

Source: PROMA (arXiv:2601.10498), figures 1 and 3 and section 3; ridge from its published code.
"""

from __future__ import annotations

import torch

from proma_megatron.config import ProjectionConfig


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
