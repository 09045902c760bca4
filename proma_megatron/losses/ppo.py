"""PPO's clipped surrogate, with a second clip where the advantage is negative.

Sources: PPO, arXiv:1707.06347, equations 6 and 7; dual clip: D. Ye et al., arXiv:1912.09729.
Advantages come from the samples of a prompt: there is no critic.
"""

from __future__ import annotations

import torch

from proma_megatron.losses.ratios import clip


def clipped_surrogate(
    ratios: torch.Tensor,
    advantages: torch.Tensor,
    low: float | None,
    high: float | None,
    dual: float | None,
) -> torch.Tensor:
    """Return what is maximized, for each token (T,): ``min(r A, clip(r, 1 - low, 1 + high) A)``.

    A token has no gradient any more once its ratio went too far where its advantage pulls it.
    Against that pull the minimum has no bound: a token with A < 0 and a large ratio may dominate
    the batch. ``dual`` = c > 1 makes it ``max(that, c A)`` for A < 0.

    Args:
        ratios: (T,), differentiable.
        advantages: (T,).
        low: None for no clipping on this side; the same for ``high``.
        dual: None for no dual clip.
    """
    surrogate = ratios * advantages
    if low is not None or high is not None:
        surrogate = torch.minimum(surrogate, clip(ratios, low, high) * advantages)
    if dual is not None:
        bounded = torch.maximum(surrogate, dual * advantages)
        surrogate = torch.where(advantages < 0, bounded, surrogate)
    return surrogate
