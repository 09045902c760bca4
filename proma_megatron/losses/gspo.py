"""GSPO: the ratio of a whole sequence, shared by its tokens.

Source: C. Zheng et al., arXiv:2507.18071, section 4; the form by token is its GSPO-token. With y
the loss tokens of a sequence,

    s = (pi(y) / pi_old(y))^(1 / |y|) = exp(mean_t (log pi_t - log pi_old_t)),

and its objective is ``min(s A, clip(s) A)``. Here each token has the ratio
``sg[s] pi_t / sg[pi_t]`` (sg: without gradient), which has s's value and the gradient
``s grad log pi_t``. All tokens of a sequence are clipped or none; means over a sequence's tokens
then have the objective's value, and its gradient: ``1 / |y| sum_t s grad log pi_t = grad s``. That
mean is the aggregation ``sequence_mean``; others weigh sequences by their lengths.
"""

from __future__ import annotations

import torch

from proma_megatron.types import PackedSequences


def sequence_ratios(
    logprobs: torch.Tensor, old: torch.Tensor, mask: torch.Tensor, sequences: PackedSequences
) -> torch.Tensor:
    """Return s (k,), without gradient; 1 for a sequence without loss tokens.

    Args:
        logprobs: (T,) finite.
        old: (T,) finite.
        mask: (T,) 1 for loss tokens, else 0.
        sequences: which token belongs to which sequence.
    """
    differences = (logprobs.detach() - old).double() * mask
    counts = sequences.sums(mask.double()).clamp(min=1)
    return torch.exp(sequences.sums(differences) / counts).to(logprobs.dtype)


def token_ratios(
    logprobs: torch.Tensor, old: torch.Tensor, mask: torch.Tensor, sequences: PackedSequences
) -> torch.Tensor:
    """Return ``sg[s] pi_t / sg[pi_t]`` (T,), differentiable; arguments as in `sequence_ratios`."""
    shared = sequences.per_token(sequence_ratios(logprobs, old, mask, sequences))
    return shared * torch.exp(logprobs - logprobs.detach())
