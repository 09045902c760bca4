"""Forward and backward over microbatches, through Megatron's stock schedules."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from proma_megatron.losses import kl
from proma_megatron.losses.clipping import clipped_tokens
from proma_megatron.losses.options import LossOptions
from proma_megatron.losses.policy_loss import policy_loss, token_advantages
from proma_megatron.model.capture import mark_backward
from proma_megatron.model.logprobs import vocab_parallel_logprobs
from proma_megatron.model.policy import Policy
from proma_megatron.types import Microbatch


class GradientAccumulator(Protocol):
    """Owner of ``main_grad`` during a backward pass, in place of Megatron's accumulation."""

    def begin(self) -> None: ...

    def enable(self, on: bool) -> None: ...

    def begin_backward(self, chunk: int, microbatch: Microbatch) -> None: ...

    def finish(self, microbatches: int) -> None: ...


@dataclass(frozen=True)
class BadLoss:
    """A microbatch of this replica whose loss is not finite."""

    microbatch: int
    # Positions t whose weight in the loss (a ratio, a penalty) is not finite although the
    # log-probability of their label is.
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Sums:
    """Sums over the loss tokens of this replica's microbatches."""

    tokens: float = 0.0
    objective: float = 0.0  # w * advantage * log pi / N, of which N is the whole minibatch's
    entropy: float = 0.0
    surprise: float = 0.0  # -log pi
    kl: float = 0.0  # k3 estimate of KL(rollout policy, current policy)
    mismatch: float = 0.0  # |log pi - rollout's log-probability|
    worst_mismatch: float = 0.0
    clipped: float = 0.0  # tokens that clipping acts on
    bad_losses: tuple[BadLoss, ...] = ()  # by microbatch; nothing says of which replica

    def __add__(self, other: Sums) -> Sums:
        names = self.__dataclass_fields__
        return Sums(
            **{
                name: (max if name == "worst_mismatch" else operator.add)(
                    getattr(self, name), getattr(other, name)
                )
                for name in names
            }
        )


def forward_backward(
    policy: Policy,
    microbatches: Sequence[Microbatch],
    options: LossOptions,
    *,
    accumulator: GradientAccumulator | None = None,
    temperature: float = 1.0,
    reduce: bool = True,
) -> Sums:
    """Compute gradients of all microbatches in ``main_grad``, reduced, ready for the optimizer.

    With an accumulator, backward carries unit losses and the accumulator owns ``main_grad``;
    without, this is Megatron's own accumulation. With ``reduce=False`` each rank is left with what
    it has accumulated itself, and no replica waits for another one.

    Returns:
        Sums of this replica, on every rank of it.
    """
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()
    if accumulator is not None:
        accumulator.begin()
        accumulator.enable(True)
    policy.config.finalize_model_grads_func = partial(
        _finalize, accumulator, len(microbatches), reduce
    )
    collected: list[Sums] = []
    step = partial(_forward_step, policy, options, accumulator, temperature, collected)
    try:
        _run(policy, microbatches, step, forward_only=False)
    finally:
        if accumulator is not None:
            accumulator.enable(False)
    return policy.topology.from_last_stage(sum(collected, start=Sums()))


def evaluate_logprobs(
    policy: Policy, microbatches: Sequence[Microbatch], temperature: float = 1.0
) -> list[torch.Tensor] | None:
    """Return log-probabilities (T,) of each microbatch's labels; None except on the last stage."""
    found: list[torch.Tensor] = []

    def step(microbatch: Microbatch, chunk: int, output: torch.Tensor) -> tuple[Any, Any]:
        def loss(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
            logprobs, _ = vocab_parallel_logprobs(
                logits[0], microbatch.labels, policy.vocab_size, policy.topology, temperature
            )
            found.append(logprobs)
            return logprobs.sum(), _no_tokens(logits), {}

        return output, loss

    with torch.no_grad():
        _run(policy, microbatches, step, forward_only=True)
    return found if policy.topology.is_last_stage else None


def _run(policy: Policy, microbatches: Sequence[Microbatch], step: Any, forward_only: bool) -> None:
    def forward_step(iterator: Any, wrapped: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        microbatch = next(iterator)
        chunk = next(i for i, c in enumerate(policy.chunks) if c is wrapped)
        return step(microbatch, chunk, policy.forward_packed(wrapped, microbatch))

    iterators = [iter(microbatches) for _ in policy.chunks]
    with policy.topology.megatron_calls():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=list[torch.nn.Module](policy.chunks),
            num_microbatches=len(microbatches),
            seq_length=max(m.num_tokens for m in microbatches),
            micro_batch_size=1,
            forward_only=forward_only,
        )


def _forward_step(
    policy: Policy,
    options: LossOptions,
    accumulator: GradientAccumulator | None,
    temperature: float,
    collected: list[Sums],
    microbatch: Microbatch,
    chunk: int,
    output: torch.Tensor,
) -> tuple[torch.Tensor, Any]:
    if accumulator is not None:
        output = mark_backward(output, partial(accumulator.begin_backward, chunk, microbatch))

    def loss(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        logprobs, entropy = vocab_parallel_logprobs(
            logits[0], microbatch.labels, policy.vocab_size, policy.topology, temperature
        )
        found = policy_loss(logprobs, entropy, microbatch, options)
        collected.append(
            _sums(found.detach(), logprobs.detach(), entropy.detach(), microbatch, options)
        )
        return found, _no_tokens(logits), {}

    return output, loss


def _no_tokens(logits: torch.Tensor) -> torch.Tensor:
    """Return no token count: N is in the loss already, and `_finalize` ignores Megatron's."""
    return torch.zeros((), dtype=torch.int, device=logits.device)


def _finalize(
    accumulator: GradientAccumulator | None,
    microbatches: int,
    reduce: bool,
    chunks: list[Any],
    num_tokens: torch.Tensor | None = None,
    **kwargs: Any,
) -> None:
    """Complete the projection, then Megatron's reductions; gradients are not rescaled."""
    if accumulator is not None:
        accumulator.finish(microbatches)
    if reduce:
        finalize_model_grads(chunks, None, **kwargs)


def kl_estimate(other: torch.Tensor, sampled: torch.Tensor) -> float:
    """Sum over tokens of the k3 estimates of KL(p, q), see `losses/kl.py`.

    Args:
        other: log q of tokens that were sampled from p, (n,).
        sampled: log p of the same tokens, (n,).
    """
    return float(kl.estimate("k3", sampled.double(), other.double()).sum())


def _sums(
    loss: torch.Tensor,
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    microbatch: Microbatch,
    options: LossOptions,
) -> Sums:
    mask = microbatch.loss_mask > 0
    picked = logprobs.double()[mask]
    if not len(picked):
        return Sums()  # without loss tokens there is no loss
    delta = picked - microbatch.old_logprobs[mask]
    weighted = microbatch.weights[mask] * token_advantages(microbatch)[mask] * picked
    values = torch.stack(
        [
            weighted.sum(),
            entropy.double()[mask].sum(),
            -picked.sum(),
            delta.abs().sum(),
            delta.abs().max(),
            clipped_tokens(logprobs, microbatch, options).sum(),
            loss.double(),
        ]
    ).tolist()
    objective, entropy_sum, surprise, mismatch, worst, clipped, value = values
    # A unit loss knows no advantages: the objective does.
    bad = (
        ()
        if math.isfinite(value) and math.isfinite(objective)
        else (_bad_loss(logprobs, entropy, microbatch, options),)
    )
    return Sums(
        tokens=float(len(picked)),
        objective=objective / microbatch.denominator,
        entropy=entropy_sum,
        surprise=surprise,
        kl=kl_estimate(picked, microbatch.old_logprobs[mask]),
        mismatch=mismatch,
        worst_mismatch=worst,
        clipped=clipped,
        bad_losses=bad,
    )


def _bad_loss(
    logprobs: torch.Tensor, entropy: torch.Tensor, microbatch: Microbatch, options: LossOptions
) -> BadLoss:
    """Find what of the loss is not finite, anew, as it was not kept."""
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        loss = policy_loss(leaf, entropy, microbatch, options)
        (factors,) = torch.autograd.grad(loss, leaf)
    bad = ~factors.isfinite() & logprobs.isfinite() & (microbatch.loss_mask > 0)
    return BadLoss(microbatch.index, tuple(bad.nonzero()[:, 0].tolist()))
