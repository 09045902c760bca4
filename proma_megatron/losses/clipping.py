"""Which tokens a loss clips: for the metrics, as no loss needs it."""

from __future__ import annotations

import torch

from proma_megatron.losses import gspo
from proma_megatron.losses.options import LossOptions
from proma_megatron.losses.ratios import clip, token_ratios
from proma_megatron.types import Microbatch


def clipped_tokens(
    logprobs: torch.Tensor, microbatch: Microbatch, options: LossOptions
) -> torch.Tensor:
    """(T,) bool: loss tokens that clipping acts on.

    Of ppo, grpo, dr_grpo and gspo those without a gradient, for their ratio left the range on the
    side that their advantage pushes to; of cispo those whose weight is bounded.

    Args:
        logprobs: (T,) of the labels, without gradient.
    """
    counted = microbatch.loss_mask > 0
    if not options.clips:
        return torch.zeros_like(counted)
    logprobs = torch.where(counted, logprobs, 0.0).double()
    old = torch.where(counted, microbatch.old_logprobs, 0.0)
    if options.kind == "gspo":
        ratios = gspo.token_ratios(logprobs, old, microbatch.loss_mask, microbatch.sequences)
    else:
        ratios = token_ratios(logprobs, old)
    within = clip(ratios, options.clip_low, options.clip_high)
    if options.kind == "cispo":
        return counted & (within != ratios)
    advantages = microbatch.sequences.per_token(microbatch.advantages)
    return counted & (within * advantages < ratios * advantages)
