"""RLOO: REINFORCE with the mean of the other samples as baseline.

Source: A. Ahmadian et al., arXiv:2402.14740.
"""

from __future__ import annotations

from collections.abc import Sequence

from proma_megatron.advantages.leave_one_out import leave_one_out


def rloo(rewards: Sequence[float]) -> list[float]:
    """Subtract the mean of the others of the group; never divide by a deviation."""
    return leave_one_out(rewards, normalize_std=False)
