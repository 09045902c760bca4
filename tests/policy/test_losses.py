"""Every loss equals a loop over sequences and tokens, and touches no other token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from proma_megatron.batching.packing import loss_tokens, pack
from proma_megatron.policy.losses import LossOptions, policy_loss
from proma_megatron.records import Microbatch, TrainingSequence

CPU = torch.device("cpu")
LOSSES = [
    LossOptions("unit"),
    LossOptions("unit", importance=True),
    LossOptions("reinforce"),
    LossOptions("reinforce", importance=True),
    LossOptions("grpo", clip_low=0.1, clip_high=0.3),
    LossOptions("supervised"),
]


def sequences(seed: int = 0, count: int = 4) -> list[TrainingSequence]:
    """Prompts and completions of random lengths, a hole in each mask, advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(n: int) -> list[float]:
        return torch.rand(n, generator=generator, dtype=torch.float64).tolist()

    found = []
    for index in range(count):
        prompt = 2 + index
        length = prompt + 5
        mask = [int(i >= prompt and i != prompt + 2) for i in range(length)]
        found.append(
            TrainingSequence(
                tokens=tuple(int(50 * u) for u in uniform(length)),
                loss_mask=tuple(mask),
                advantage=(-1) ** index * (0.5 + uniform(1)[0]),
                old_logprobs=tuple(-3 * u * m for u, m in zip(uniform(length), mask, strict=True)),
                token_weights=tuple(0.5 + u for u in uniform(length)),
            )
        )
    return found


def packed(found: list[TrainingSequence], denominator: float = 17.0) -> Microbatch:
    return pack(found, 0, denominator, CPU, multiple=8)


def logprobs_near(microbatch: Microbatch, seed: int = 1) -> torch.Tensor:
    """(T,) around the rollout's, so that ratios fall on both sides of the clipping range."""
    generator = torch.Generator().manual_seed(seed)
    noise = 0.5 * torch.randn(microbatch.num_tokens, generator=generator, dtype=torch.float64)
    return (microbatch.old_logprobs + noise).requires_grad_()


def looped(
    logprobs: torch.Tensor,
    found: list[TrainingSequence],
    options: LossOptions,
    denominator: float,
) -> torch.Tensor:
    """The loss token by token, from the records and not from the packed tensors."""
    total = torch.zeros((), dtype=torch.float64)
    start = 0
    for sequence in found:
        assert sequence.token_weights is not None
        for i in range(1, len(sequence.tokens)):
            if not sequence.loss_mask[i]:
                continue
            logprob = logprobs[start + i - 1]  # the position before token i predicts it
            weight = sequence.token_weights[i] / denominator
            ratio = (logprob - sequence.old_logprobs[i]).exp()
            ratio_now = float(ratio.detach())
            advantage = sequence.advantage
            if options.importance:
                weight *= ratio_now
            if options.kind in ("unit", "supervised"):
                total = total - weight * logprob
            elif options.kind == "reinforce":
                total = total - weight * advantage * logprob
            else:
                low, high = 1 - options.clip_low, 1 + options.clip_high
                kept = min(max(ratio_now, low), high)
                unclipped = ratio_now * advantage <= kept * advantage
                total = total - weight * advantage * (ratio if unclipped else kept)
        start += len(sequence.tokens)
    return total


def gradient(loss: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, logprobs, retain_graph=True)[0]


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_value_and_gradient_equal_a_loop_over_tokens(options: LossOptions) -> None:
    found = sequences()
    microbatch = packed(found)
    logprobs = logprobs_near(microbatch)
    fast = policy_loss(logprobs, microbatch, options)
    slow = looped(logprobs, found, options, 17.0)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        gradient(fast, logprobs), gradient(slow, logprobs), rtol=0, atol=1e-14
    )
    assert gradient(fast, logprobs).abs().max() > 0.01


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_prompts_and_padding_have_no_gradient_whatever_their_log_probability(
    options: LossOptions,
) -> None:
    found = sequences()
    microbatch = packed(found)
    assert microbatch.num_tokens > sum(microbatch.lengths)
    logprobs = logprobs_near(microbatch)
    outside = microbatch.loss_mask == 0
    extreme = logprobs.detach().masked_fill(outside, -1e4).requires_grad_()
    loss = policy_loss(extreme, microbatch, options)
    grad = gradient(loss, extreme)
    assert torch.equal(grad[outside], torch.zeros(int(outside.sum())).double())
    assert bool((microbatch.loss_mask[grad != 0] == 1).all())
    torch.testing.assert_close(loss, policy_loss(logprobs, microbatch, options), rtol=0, atol=1e-15)


def test_importance_weighted_unit_times_advantage_is_the_gradient_of_the_ratio_surrogate() -> None:
    for index, sequence in enumerate(sequences()):
        microbatch = packed([sequence])
        logprobs = logprobs_near(microbatch, seed=index)
        unit = policy_loss(logprobs, microbatch, LossOptions("unit", importance=True))
        weights = microbatch.loss_mask * microbatch.weights / microbatch.denominator
        ratio = (logprobs - microbatch.old_logprobs).exp()
        surrogate = -(weights * ratio * sequence.advantage).sum()
        torch.testing.assert_close(
            sequence.advantage * gradient(unit, logprobs),
            gradient(surrogate, logprobs),
            rtol=0,
            atol=1e-15,
        )


def test_unit_loss_knows_no_advantage() -> None:
    found = sequences()
    logprobs = logprobs_near(packed(found))
    others = [replace(sequence, advantage=0.0) for sequence in found]
    losses = [policy_loss(logprobs, packed(s), LossOptions("unit")) for s in (found, others)]
    assert losses[0].item() == losses[1].item() != 0


@pytest.mark.parametrize(
    ("advantage", "ratio", "value", "moves"),
    [
        (2.0, 1.1, 2.2, True),
        (2.0, 1.5, 2.6, False),  # clipped above at 1.3
        (2.0, 0.5, 1.0, True),  # a bad step from a good token may be undone
        (-2.0, 0.95, -1.9, True),
        (-2.0, 0.5, -1.8, False),  # clipped below at 0.9
        (-2.0, 1.5, -3.0, True),
    ],
)
def test_grpo_clips_each_sign_of_advantage_on_its_side(
    advantage: float, ratio: float, value: float, moves: bool
) -> None:
    sequence = TrainingSequence((5, 6), (0, 1), advantage, (0.0, -2.0))
    microbatch = pack([sequence], 0, 4.0, CPU)
    logprobs = torch.tensor([-2.0, 0.0], dtype=torch.float64)
    logprobs[0] += torch.tensor(ratio, dtype=torch.float64).log()
    logprobs.requires_grad_()
    loss = policy_loss(logprobs, microbatch, LossOptions("grpo", clip_low=0.1, clip_high=0.3))
    assert loss.item() == pytest.approx(-value / 4, abs=1e-12)
    expected = -advantage * ratio / 4 if moves else 0.0
    assert gradient(loss, logprobs).tolist() == pytest.approx([expected, 0.0], abs=1e-12)


def test_on_policy_losses_with_advantages_have_one_gradient() -> None:
    microbatch = packed(sequences())
    logprobs = microbatch.old_logprobs.clone().requires_grad_()
    plain, weighted, clipped = (
        gradient(policy_loss(logprobs, microbatch, options), logprobs)
        for options in (
            LossOptions("reinforce"),
            LossOptions("reinforce", importance=True),
            LossOptions("grpo"),
        )
    )
    torch.testing.assert_close(weighted, plain, rtol=0, atol=1e-15)
    torch.testing.assert_close(clipped, plain, rtol=0, atol=1e-15)


def test_supervised_loss_is_the_mean_cross_entropy_of_the_masked_tokens() -> None:
    found = [replace(sequence, token_weights=None) for sequence in sequences()]
    microbatch = packed(found, float(loss_tokens(found)))
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn((microbatch.num_tokens, 50), generator=generator, dtype=torch.float64)
    logprobs = logits.log_softmax(dim=1).gather(1, microbatch.labels[:, None])[:, 0]
    counted = microbatch.loss_mask > 0
    expected = F.cross_entropy(logits[counted], microbatch.labels[counted])
    loss = policy_loss(logprobs, microbatch, LossOptions("supervised"))
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_microbatches_that_share_a_denominator_add_up_to_the_whole(options: LossOptions) -> None:
    found = sequences()
    whole = packed(found)
    logprobs = logprobs_near(whole).detach()
    total, start = 0.0, 0
    for part in (found[:1], found[1:]):
        microbatch = packed(part)
        length = sum(microbatch.lengths)
        values = torch.zeros(microbatch.num_tokens, dtype=torch.float64)
        values[:length] = logprobs[start : start + length]
        total += float(policy_loss(values, microbatch, options))
        start += length
    loss = float(policy_loss(logprobs, whole, options))
    assert total == pytest.approx(loss, abs=1e-14)
    halved = float(policy_loss(logprobs, replace(whole, denominator=34.0), options))
    assert halved == pytest.approx(loss / 2, abs=1e-14)


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_loss_keeps_the_precision_of_the_log_probabilities(options: LossOptions) -> None:
    microbatch = packed(sequences())
    wide = logprobs_near(microbatch).detach()
    narrow = policy_loss(wide.float(), microbatch, options)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(
        narrow.double(), policy_loss(wide, microbatch, options), rtol=1e-5, atol=1e-6
    )


def test_unknown_loss_is_refused_by_name() -> None:
    microbatch = packed(sequences())
    with pytest.raises(ValueError, match="unknown loss 'ppo'"):
        policy_loss(logprobs_near(microbatch), microbatch, LossOptions("ppo"))
