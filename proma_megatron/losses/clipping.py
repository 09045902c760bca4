"""Which tokens a loss clips: for the metrics, as no loss needs it."""

from __future__ import annotations

import torch

from proma_megatron.config.choices import LOSSES
from proma_megatron.losses.options import LossOptions
from proma_megatron.losses.ratios import clip
from proma_megatron.losses.registry import ratios_of
from proma_megatron.types import Microbatch


def clipped_tokens(
    logprobs: torch.Tensor, microbatch: Microbatch, options: LossOptions
) -> torch.Tensor:
    """Return (T,) bool: loss tokens that clipping acts on.

    Of a loss that clips by the advantage's sign, those whose ratio left the range on the side that
    their advantage pushes to, where PPO's have no gradient; of others, those whose weight is
    bounded.

    Args:
        logprobs: (T,) of the labels, without gradient.
    """
    counted = microbatch.loss_mask > 0
    if not options.clips:
        return torch.zeros_like(counted)
    logprobs = torch.where(counted, logprobs, 0.0).double()
    old = torch.where(counted, microbatch.old_logprobs, 0.0)
    ratios = ratios_of(options.kind, logprobs, old, microbatch)
    within = clip(ratios, options.clip_low, options.clip_high)
    if not LOSSES[options.kind].sign_dependent:
        return counted & (within != ratios)
    advantages = microbatch.sequences.per_token(microbatch.advantages)
    return counted & (within * advantages < ratios * advantages)
