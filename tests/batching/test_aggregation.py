"""Aggregations equal their definitions, whatever microbatch and replica a sequence is in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from proma_megatron.batching.aggregation import aggregate
from proma_megatron.batching.packing import pack
from proma_megatron.losses.options import REINFORCE, LossOptions
from proma_megatron.losses.policy_loss import policy_loss
from proma_megatron.types import TrainingSequence

MODES = ["token_mean", "sequence_mean", "sequence_sum"]
CONSTANT = 6.5
LOSSES = [
    REINFORCE,
    LossOptions("ppo", clip_low=0.1, clip_high=0.1, entropy=0.2, kl=0.4),
    LossOptions("gspo", clip_low=0.05, clip_high=0.05),
    LossOptions("cispo", clip_low=1.0, clip_high=0.1),
]


def sequences(weighted: bool = True) -> list[TrainingSequence]:
    """Of 1 to 7 loss tokens, and one without any."""
    generator = torch.Generator().manual_seed(5)

    def uniform(n: int) -> list[float]:
        return torch.rand(n, generator=generator, dtype=torch.float64).tolist()

    found = []
    for completion in (3, 0, 7, 1, 4):
        length = 2 + completion
        found.append(
            TrainingSequence(
                tokens=tuple(int(50 * u) for u in uniform(length)),
                loss_mask=(0, 0) + (1,) * completion,
                advantage=uniform(1)[0] - 0.5,
                old_logprobs=tuple(-u for u in uniform(length)),
                token_weights=tuple(0.5 + u for u in uniform(length)) if weighted else None,
                reference_logprobs=tuple(-u for u in uniform(length)),
            )
        )
    return found


def logprobs_of(found: list[TrainingSequence]) -> list[torch.Tensor]:
    """(L,) of each sequence, entry i for its token i."""
    generator = torch.Generator().manual_seed(6)
    return [
        -torch.rand(len(sequence.tokens), generator=generator, dtype=torch.float64)
        for sequence in found
    ]


def run(
    found: list[TrainingSequence],
    logprobs: list[torch.Tensor],
    parts: list[list[int]],
    n: float,
    options: LossOptions,
) -> tuple[float, list[torch.Tensor]]:
    """Sum of the losses of microbatches, and the gradient for each sequence."""
    total, grads = 0.0, [torch.zeros_like(values) for values in logprobs]
    for members in parts:
        microbatch = pack([found[at] for at in members], 0, n, torch.device("cpu"), 4)
        # Position t predicts the token after it.
        shifted = [torch.cat([logprobs[at][1:], torch.zeros(1).double()]) for at in members]
        padding = torch.zeros(microbatch.num_tokens - sum(microbatch.lengths)).double()
        values = torch.cat([*shifted, padding]).requires_grad_()
        loss = policy_loss(values, -values.detach(), microbatch, options)
        (grad,) = torch.autograd.grad(loss, values)
        total += float(loss.detach())
        start = 0
        for at, length in zip(members, microbatch.lengths, strict=True):
            grads[at][1:] = grad[start : start + length - 1]
            start += length
    return total, grads


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gradient_is_that_of_the_definition(mode: str, weighted: bool) -> None:
    found = sequences(weighted)
    logprobs = logprobs_of(found)
    leaves = [values.clone().requires_grad_() for values in logprobs]
    per_sequence, tokens = [], 0
    for sequence, values in zip(found, leaves, strict=True):
        weights = sequence.token_weights or (1.0,) * len(sequence.tokens)
        terms = [
            -weights[i] * sequence.advantage * values[i]
            for i in range(len(sequence.tokens))
            if sequence.loss_mask[i]
        ]
        if terms:
            per_sequence.append(terms)
            tokens += len(terms)
    assert len(per_sequence) == 4
    if mode == "token_mean":
        loss = torch.stack([term for terms in per_sequence for term in terms]).sum() / tokens
    elif mode == "sequence_mean":
        loss = torch.stack([torch.stack(terms).mean() for terms in per_sequence]).mean()
    else:
        loss = torch.stack([torch.stack(t).sum() / CONSTANT for t in per_sequence]).mean()
    loss.backward()

    changed, n = aggregate(found, mode, CONSTANT)
    value, grads = run(changed, logprobs, [[0, 1, 2, 3, 4]], n, REINFORCE)
    assert value == pytest.approx(float(loss.detach()), abs=1e-15)
    for leaf, grad in zip(leaves, grads, strict=True):
        wanted = torch.zeros_like(grad) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-16)


@pytest.mark.parametrize("options", LOSSES, ids=lambda options: options.kind)
@pytest.mark.parametrize("mode", MODES)
def test_neither_microbatches_nor_replicas_change_the_sum(mode: str, options: LossOptions) -> None:
    found = sequences()
    logprobs = logprobs_of(found)
    changed, n = aggregate(found, mode, CONSTANT)
    value, grads = run(changed, logprobs, [[0, 1, 2, 3, 4]], n, options)
    assert abs(value) > 1e-3
    for parts in ([[0], [1], [2], [3], [4]], [[4, 2], [], [1, 3, 0]]):
        other, others = run(changed, logprobs, parts, n, options)
        assert other == pytest.approx(value, abs=1e-14)
        for left, right in zip(others, grads, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-15)


def test_modes_weigh_a_token_as_they_say() -> None:
    """4 sequences with loss tokens, 15 tokens in all."""
    found = sequences(weighted=False)
    share = {}
    for mode in MODES:
        changed, n = aggregate(found, mode, CONSTANT)
        assert [s.loss_tokens for s in changed] == [3, 0, 7, 1, 4]
        share[mode] = [(s.token_weights or (1.0,))[-1] / n for s in changed if s.loss_tokens]
    assert share["token_mean"] == pytest.approx([1 / 15] * 4)
    assert share["sequence_mean"] == pytest.approx([1 / 12, 1 / 28, 1 / 4, 1 / 16])
    assert share["sequence_sum"] == pytest.approx([1 / (4 * CONSTANT)] * 4)


@pytest.mark.parametrize("mode", ["token_mean", "sequence_sum"])
def test_weights_that_stay_are_not_touched(mode: str) -> None:
    found = sequences()
    assert aggregate(found, mode, CONSTANT)[0] == found


@pytest.mark.parametrize("mode", MODES)
def test_without_loss_tokens_the_denominator_is_not_zero(mode: str) -> None:
    silent = [replace(s, loss_mask=(0,) * len(s.tokens)) for s in sequences()]
    for found in ([], silent, [replace(silent[0], loss_mask=(1, 0, 0, 0, 0))]):
        assert aggregate(found, mode, CONSTANT)[1] == (CONSTANT if mode == "sequence_sum" else 1)


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown aggregation 'median'"):
        aggregate(sequences(), "median", 1.0)
