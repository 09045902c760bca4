"""The entropy bonus, which keeps a policy from settling early.

Sources: R. J. Williams and J. Peng, "Function optimization using connectionist reinforcement
learning algorithms", 1991; V. Mnih et al., arXiv:1602.01783, section 4.
"""

from __future__ import annotations

import torch


def entropy_loss(entropy: torch.Tensor, weights: torch.Tensor, coefficient: float) -> torch.Tensor:
    """Return what the loss gains: ``-coefficient * sum_t w_t H_t``.

    Args:
        entropy: (T,) of the distribution that each token was sampled from, differentiable.
        weights: (T,) those of the policy loss, over N; for ``token_mean`` they sum to 1 over a
            minibatch, and the sum is a mean.
    """
    return -coefficient * (weights * entropy).sum()
