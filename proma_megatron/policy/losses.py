"""Policy losses of one packed microbatch, as sums that are divided by the global N already.

A *unit* loss leaves the advantage out: it is what the projected backward carries, and the
accumulator multiplies with advantages when it adds weight gradients. The other losses are ordinary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from proma_megatron.records import Microbatch


@dataclass(frozen=True)
class LossOptions:
    """Which loss a backward pass carries."""

    kind: str  # "unit", "reinforce", "grpo" or "supervised"
    importance: bool = False  # weight tokens by the unclipped, detached ratio to the rollout policy
    clip_low: float = 0.2
    clip_high: float = 0.2


def token_advantages(microbatch: Microbatch) -> torch.Tensor:
    """(T,) float64 advantage of each token's sequence, 0 on padding."""
    return microbatch.sequences.per_token(microbatch.advantages)


def policy_loss(
    logprobs: torch.Tensor, microbatch: Microbatch, options: LossOptions
) -> torch.Tensor:
    """The scalar that backward starts from.

    Args:
        logprobs: (T,) of the labels under the current policy, differentiable.

    With weights ``w = mask * token_weight``:

    - unit: ``-(1/N) sum_t w_t log pi_t``; with importance, w_t also has the detached ratio
      ``pi_t / pi_old_t``, whose gradient is that of the unclipped surrogate ``ratio * advantage``.
    - reinforce: the same times the advantage of the token's sequence.
    - grpo: ``-(1/N) sum_t w_t min(ratio A, clip(ratio, 1 - low, 1 + high) A)``
      (PPO, arXiv:1707.06347, equation 7; GRPO, arXiv:2402.03300, without its KL term).
    - supervised: cross-entropy of the masked tokens.
    """
    weights = microbatch.loss_mask * microbatch.weights
    weights = weights.to(logprobs.dtype) / microbatch.denominator
    if options.kind == "supervised":
        return -(weights * logprobs).sum()
    ratio = torch.exp(logprobs - microbatch.old_logprobs.to(logprobs.dtype))
    # Positions that do not count have no old log-probability; keep inf * 0 out of the sum.
    ratio = torch.where(microbatch.loss_mask > 0, ratio, 1.0)
    if options.kind == "grpo":
        advantages = token_advantages(microbatch).to(logprobs.dtype)
        clipped = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
        return -(weights * torch.minimum(ratio * advantages, clipped * advantages)).sum()
    if options.importance:
        weights = weights * ratio.detach()
    if options.kind == "unit":
        return -(weights * logprobs).sum()
    if options.kind == "reinforce":
        return -(weights * token_advantages(microbatch).to(logprobs.dtype) * logprobs).sum()
    raise ValueError(f"unknown loss {options.kind!r}")
