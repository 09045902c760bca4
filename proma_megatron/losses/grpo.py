"""GRPO: PPO's surrogate with group-relative advantages.

Source: arXiv:2402.03300, equation 3. Its other parts are knobs of their own: advantages
(`batching/advantages/group.py`), the KL penalty (`kl.py`, k3 to the initial policy) and the mean
over sequences of means over tokens (`batching/aggregation.py`, ``sequence_mean``).
"""

from __future__ import annotations

from proma_megatron.losses.ppo import clipped_surrogate

__all__ = ["clipped_surrogate"]
