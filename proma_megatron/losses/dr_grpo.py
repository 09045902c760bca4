"""Dr. GRPO: GRPO without what biases it to long wrong answers and to easy or hard prompts.

Source: arXiv:2503.20783, section 3. A token's loss is GRPO's. What differs is around it:
advantages are not divided by the group's standard deviation, and a sequence's tokens are summed
and divided by a constant instead of the length (`batching/aggregation.py`, ``sequence_sum``).
"""

from __future__ import annotations

from proma_megatron.losses.ppo import clipped_surrogate

__all__ = ["clipped_surrogate"]
