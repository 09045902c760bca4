"""REINFORCE: ``-u A log pi`` for each token.

Source: R. J. Williams, "Simple statistical gradient-following algorithms for connectionist
reinforcement learning", 1992. With importance, u is the ratio to the policy that sampled, so the
gradient is that of the surrogate ``ratio * A`` (PPO, arXiv:1707.06347, equation 6) off policy, too.
"""

from __future__ import annotations

import torch


def token_weights(ratios: torch.Tensor, importance: bool) -> torch.Tensor:
    """Return u (T,), without gradient: the unclipped ratio with importance, else 1."""
    return ratios.detach() if importance else torch.ones_like(ratios)
