"""Estimates of a KL divergence, token by token, from tokens that one of two policies sampled.

Tokens come from p; with ``d = log q - log p``, estimates of KL(p, q) are

    k1 = -d              k2 = d^2 / 2              k3 = exp(d) - 1 - d

k1 and k3 have the exact value in expectation; k3 is never negative, and varies less while p and q
are close. k2 is biased, by third-order terms in d. Source: J. Schulman, "Approximating KL
divergence", 2020.

Whether the *gradient* with respect to the policy is exact depends on who sampled:

- p is the policy, q the reference. A backward pass doesn't see that p also decides what is
  sampled. On policy, k2 has the gradient of KL(p, q); k1's is 0 in expectation, which is noise and
  no penalty; k3's is that of KL(q, p), the other direction, which agrees to first order.
- p is the reference, q the policy. p is fixed: k1 and k3 have the gradient of KL(p, q), k2 not.
"""

from __future__ import annotations

import torch


def estimate(estimator: str, sampled: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Estimate KL(p, q), one value a token (n,); differentiable in both arguments.

    Args:
        estimator: "k1", "k2" or "k3".
        sampled: log p of tokens that were sampled from p, (n,).
        other: log q of the same tokens, (n,).
    """
    delta = other - sampled
    if estimator == "k1":
        return -delta
    if estimator == "k2":
        return delta.square() / 2
    if estimator == "k3":
        return torch.expm1(delta) - delta
    raise ValueError(f"unknown KL estimator {estimator!r}")


def penalty(
    estimator: str, policy: torch.Tensor, reference: torch.Tensor, kind: str
) -> torch.Tensor:
    """Estimate how far the policy is from its reference, one value a token (n,).

    Args:
        policy: log-probabilities (n,) under the policy, differentiable.
        reference: (n,) under the reference.
        kind: which reference this is. "initial": the policy sampled, estimates of
            KL(policy, reference), as GRPO's. "rollout": the reference did, of KL(reference, policy)
            as in PPO (arXiv:1707.06347, equation 8).
    """
    if kind == "initial":
        return estimate(estimator, sampled=policy, other=reference)
    if kind == "rollout":
        return estimate(estimator, sampled=reference, other=policy)
    raise ValueError(f"unknown KL reference {kind!r}")


def adapted(coefficient: float, divergence: float, target: float) -> float:
    """Return the next step's coefficient: halved or doubled where this step was off target.

    Source: PPO, arXiv:1707.06347, section 4.
    """
    if divergence < target / 1.5:
        return coefficient / 2
    if divergence > target * 1.5:
        return coefficient * 2
    return coefficient
