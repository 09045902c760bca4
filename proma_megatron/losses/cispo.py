"""CISPO: the importance weight is clipped, not the token's gradient.

Source: MiniMax-M1, arXiv:2506.13585, section 3.1. A token whose ratio left the range goes on
learning, with the weight of the range's end, where PPO drops it. The weight doesn't know the
advantage, so a unit loss can carry it. The paper clips above only: that is ``low`` = 1.
"""

from __future__ import annotations

import torch

from proma_megatron.losses.ratios import clip


def token_weights(ratios: torch.Tensor, low: float | None, high: float | None) -> torch.Tensor:
    """Return w (T,) in ``-w A log pi``, without gradient."""
    return clip(ratios.detach(), low, high)
