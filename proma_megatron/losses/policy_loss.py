"""The loss of one packed microbatch, put together from this package's parts.

A *unit* loss leaves the advantage out: it is what the projected backward carries, and the
accumulator multiplies with advantages when it adds weight gradients. The other losses are ordinary.
"""

from __future__ import annotations

import torch

from proma_megatron.losses import kl
from proma_megatron.losses.entropy import entropy_loss
from proma_megatron.losses.options import LossOptions
from proma_megatron.losses.registry import Likelihood, Surrogate, find_loss, ratios_of
from proma_megatron.types import Microbatch


def token_advantages(microbatch: Microbatch) -> torch.Tensor:
    """Return (T,) float64 the advantage of each token's sequence, 0 on padding."""
    return microbatch.sequences.per_token(microbatch.advantages)


def policy_loss(
    logprobs: torch.Tensor, entropy: torch.Tensor, microbatch: Microbatch, options: LossOptions
) -> torch.Tensor:
    """Return the scalar that backward starts from; divided by the global N already.

    Args:
        logprobs: (T,) of the labels under the current policy, differentiable.
        entropy: (T,) of the distributions that they are from, differentiable; only a bonus reads
            it.

    With weights ``w = mask * token_weight / N``, ratios r to the rollout policy and advantages A of
    the tokens' sequences:

    - reinforce: ``-sum w u A log pi``, u = 1 or the detached r (`reinforce.py`).
    - cispo: the same with u the clipped, detached r (`cispo.py`).
    - ppo, grpo, dr_grpo: ``-sum w min(r A, clip(r) A)`` (`ppo.py`).
    - gspo: the same with one ratio for a sequence (`gspo.py`).
    - supervised: cross-entropy of the masked tokens.
    - unit: ``-sum w u log pi`` with the same u; of a surrogate without clipping, u is the detached
      r, with which gradients times A are the surrogate's.

    An entropy bonus (`entropy.py`) and a KL penalty (`kl.py`) are added with the same weights,
    whatever A is.

    Raises:
        ValueError: a loss that doesn't exist, that a unit loss can't be, or whose reference
            log-probabilities are missing.
    """
    function = find_loss(options.kind)
    if options.unit:
        _check_unit(function, options)
    counted = microbatch.loss_mask > 0

    def of_counted(values: torch.Tensor) -> torch.Tensor:
        """Put 0 where nothing counts: what stands there must reach neither sum nor gradient."""
        return torch.where(counted, values, 0.0).to(logprobs.dtype)

    weights = (microbatch.loss_mask * microbatch.weights).to(logprobs.dtype)
    weights = weights / microbatch.denominator
    logprobs, old = of_counted(logprobs), of_counted(microbatch.old_logprobs)
    ratios = ratios_of(options.kind, logprobs, old, microbatch)
    advantages = token_advantages(microbatch).to(logprobs.dtype)

    if options.unit or isinstance(function, Likelihood):
        factors = weights * _likelihood_weights(function, ratios, options)
        if not options.unit and options.kind != "supervised":
            factors = factors * advantages
        loss = -(factors * logprobs).sum()
    else:
        low, high = options.clip_low, options.clip_high
        loss = -(weights * function.value(ratios, advantages, low, high, options.dual_clip)).sum()

    if options.entropy:
        loss = loss + entropy_loss(of_counted(entropy), weights, options.entropy)
    if options.kl:
        reference = of_counted(_reference(microbatch, options))
        terms = kl.penalty(options.kl_estimator, logprobs, reference, options.kl_reference)
        loss = loss + options.kl * (weights * terms).sum()
    return loss


def _check_unit(function: Likelihood | Surrogate, options: LossOptions) -> None:
    """Check that advantages times the gradients of sequences can be this loss's gradient."""
    clips = {
        "clip_low": options.clip_low,
        "clip_high": options.clip_high,
        "dual_clip": options.dual_clip,
    }
    for name, value in clips.items():
        if isinstance(function, Surrogate) and value is not None:
            raise ValueError(
                f"unit loss {options.kind!r} with {name}={value}: it clips by the advantage's "
                "sign, which a unit loss does not know"
            )
    for name, value in (("entropy", options.entropy), ("kl", options.kl)):
        if value:
            raise ValueError(
                f"unit loss {options.kind!r} with {name}={value}: it has no advantage to be "
                "multiplied with"
            )


def _likelihood_weights(
    function: Likelihood | Surrogate, ratios: torch.Tensor, options: LossOptions
) -> torch.Tensor:
    """Return u (T,): what log-probabilities are weighted with, whatever the advantage."""
    if isinstance(function, Likelihood):
        return function.weights(ratios, options)
    return ratios.detach()  # the gradient of r A is r A times that of log pi


def _reference(microbatch: Microbatch, options: LossOptions) -> torch.Tensor:
    """Return log-probabilities (T,) that the KL penalty compares with."""
    if options.kl_reference != "initial":
        return microbatch.old_logprobs
    if microbatch.reference_logprobs is not None:
        return microbatch.reference_logprobs
    if not microbatch.lengths:  # it only keeps replicas in step
        return torch.zeros_like(microbatch.old_logprobs)
    raise ValueError("a KL penalty needs reference_logprobs, which this microbatch does not have")
