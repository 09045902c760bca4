"""Every loss equals a loop over sequences and tokens, and touches no other token."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from proma_megatron.batching.aggregation import aggregate
from proma_megatron.batching.packing import loss_tokens, pack
from proma_megatron.losses.clipping import clipped_tokens
from proma_megatron.losses.gspo import sequence_ratios
from proma_megatron.losses.options import REINFORCE, SUPERVISED, UNIT, LossOptions
from proma_megatron.losses.policy_loss import policy_loss, token_advantages
from proma_megatron.types import Microbatch, TrainingSequence

CPU = torch.device("cpu")
SURROGATES = ("ppo", "grpo", "dr_grpo", "gspo")


def unclipped(kind: str, unit: bool = False) -> LossOptions:
    return LossOptions(kind, unit, clip_low=None, clip_high=None)


UNITS = [
    UNIT,
    LossOptions("reinforce", unit=True, importance=True),
    LossOptions("cispo", unit=True, clip_low=1.0, clip_high=0.2),
    LossOptions("cispo", unit=True, clip_low=0.2, clip_high=None),
    *(unclipped(kind, unit=True) for kind in SURROGATES),
]
PLAIN = [
    REINFORCE,
    LossOptions("reinforce", importance=True),
    LossOptions("ppo", clip_low=0.1, clip_high=0.3),
    LossOptions("ppo", clip_low=None, clip_high=0.3),
    LossOptions("ppo", clip_low=0.1, clip_high=None),
    LossOptions("ppo", clip_low=None, clip_high=None, dual_clip=1.1),
    LossOptions("grpo", clip_low=0.1, clip_high=0.3, dual_clip=1.4),
    LossOptions("dr_grpo", clip_low=0.1, clip_high=0.1),
    LossOptions("gspo", clip_low=0.05, clip_high=0.05),
    LossOptions("gspo", clip_low=0.02, clip_high=0.02, dual_clip=1.05),
    *(unclipped(kind) for kind in SURROGATES),
    LossOptions("cispo", clip_low=1.0, clip_high=0.2),
    LossOptions("cispo", clip_low=0.1, clip_high=0.1),
]
PENALIZED = [
    replace(options, kl=0.7, kl_estimator=estimator, kl_reference=reference, entropy=bonus)
    for (estimator, reference), (options, bonus) in zip(
        product(("k1", "k2", "k3"), ("initial", "rollout")),
        [(PLAIN[2], 0.0), (PLAIN[6], 0.2), (PLAIN[8], 0.2), (PLAIN[0], 0.0), (PLAIN[-1], 0.3),
         (PLAIN[1], 0.3)],
        strict=True,
    )
]  # fmt: skip
BONUS = [replace(options, entropy=0.3) for options in (PLAIN[0], PLAIN[2], PLAIN[8], PLAIN[-1])]
LOSSES = [SUPERVISED, *UNITS, *PLAIN, *PENALIZED, *BONUS]


def name(options: LossOptions) -> str:
    """What differs from the defaults."""
    default = LossOptions(options.kind)
    fields = {n: getattr(options, n) for n in LossOptions.__dataclass_fields__ if n != "kind"}
    changed = [f"{n}={v}" for n, v in fields.items() if v != getattr(default, n)]
    return "-".join([options.kind, *changed])


each_loss = pytest.mark.parametrize("options", LOSSES, ids=name)


def sequences(seed: int = 0, count: int = 5) -> list[TrainingSequence]:
    """Prompts and completions of random lengths, a hole in each mask, advantages of both signs.

    The third sequence has advantage 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(n: int) -> list[float]:
        return torch.rand(n, generator=generator, dtype=torch.float64).tolist()

    found = []
    for index in range(count):
        prompt = 2 + index
        length = prompt + 5 + index
        mask = [int(i >= prompt and i != prompt + 2) for i in range(length)]
        found.append(
            TrainingSequence(
                tokens=tuple(int(50 * u) for u in uniform(length)),
                loss_mask=tuple(mask),
                advantage=0.0 if index == 2 else (-1) ** index * (0.5 + uniform(1)[0]),
                old_logprobs=tuple(-3 * u * m for u, m in zip(uniform(length), mask, strict=True)),
                token_weights=tuple(0.5 + u for u in uniform(length)),
                reference_logprobs=tuple(
                    -3 * u * m for u, m in zip(uniform(length), mask, strict=True)
                ),
            )
        )
    return found


def packed(found: list[TrainingSequence], denominator: float = 17.0) -> Microbatch:
    return pack(found, 0, denominator, CPU, multiple=8)


def logprobs_near(microbatch: Microbatch, seed: int = 3) -> torch.Tensor:
    """(T,) around the rollout's, so that ratios fall on both sides of the clipping range."""
    generator = torch.Generator().manual_seed(seed)
    noise = 0.5 * torch.randn(microbatch.num_tokens, generator=generator, dtype=torch.float64)
    return (microbatch.old_logprobs + noise).requires_grad_()


def entropies(microbatch: Microbatch) -> torch.Tensor:
    """(T,) of anything positive, differentiable."""
    generator = torch.Generator().manual_seed(4)
    return torch.rand(
        microbatch.num_tokens, generator=generator, dtype=torch.float64
    ).requires_grad_()


def loss_of(logprobs: torch.Tensor, microbatch: Microbatch, options: LossOptions) -> torch.Tensor:
    return policy_loss(logprobs, entropies(microbatch), microbatch, options)


def looped(
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    found: list[TrainingSequence],
    options: LossOptions,
    denominator: float,
) -> torch.Tensor:
    """The loss token by token, from the records and not from the packed tensors."""
    total = torch.zeros((), dtype=torch.float64)
    start = 0
    for sequence in found:
        assert sequence.token_weights is not None
        # The position before token i predicts it.
        counted = [i for i in range(1, len(sequence.tokens)) if sequence.loss_mask[i]]
        moved = [
            float(logprobs[start + i - 1].detach()) - sequence.old_logprobs[i] for i in counted
        ]
        for i, change in zip(counted, moved, strict=True):
            logprob = logprobs[start + i - 1]
            ratio_now = math.exp(change)
            if options.kind == "gspo":
                ratio_now = math.exp(sum(moved) / len(moved))
            # With this value, and the gradient of ratio_now * log pi.
            ratio = ratio_now * (1 + logprob - logprob.detach())
            low = -math.inf if options.clip_low is None else 1 - options.clip_low
            high = math.inf if options.clip_high is None else 1 + options.clip_high
            kept = min(max(ratio_now, low), high)
            advantage = 1.0 if options.unit else sequence.advantage
            if options.kind == "supervised":
                gain = logprob
            elif options.kind == "reinforce":
                gain = (ratio_now if options.importance else 1.0) * advantage * logprob
            elif options.kind == "cispo":
                gain = kept * advantage * logprob
            elif options.unit:
                gain = ratio_now * logprob
            else:
                gain = ratio * advantage
                if kept * advantage < ratio_now * advantage:
                    gain = torch.tensor(kept * advantage, dtype=torch.float64)
                dual = options.dual_clip
                if dual is not None and advantage < 0 and float(gain.detach()) < dual * advantage:
                    gain = torch.tensor(dual * advantage, dtype=torch.float64)
            weight = sequence.token_weights[i] / denominator
            total = total - weight * gain
            total = total - weight * options.entropy * entropy[start + i - 1]
            total = total + weight * options.kl * divergence(logprob, sequence, i, options)
        start += len(sequence.tokens)
    return total


def divergence(
    logprob: torch.Tensor, sequence: TrainingSequence, i: int, options: LossOptions
) -> torch.Tensor:
    """Of a token that p sampled, with x = q / p: -log x, (log x)^2 / 2 or x - 1 - log x."""
    assert sequence.reference_logprobs is not None
    if options.kl_reference == "initial":
        x = math.exp(sequence.reference_logprobs[i]) / logprob.exp()
    else:
        x = logprob.exp() / math.exp(sequence.old_logprobs[i])
    return {"k1": -x.log(), "k2": x.log() ** 2 / 2, "k3": x - 1 - x.log()}[options.kl_estimator]


def gradient(loss: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, logprobs, retain_graph=True)[0]


@each_loss
def test_value_and_gradient_equal_a_loop_over_tokens(options: LossOptions) -> None:
    found = sequences()
    microbatch = packed(found)
    logprobs, entropy = logprobs_near(microbatch), entropies(microbatch)
    fast = policy_loss(logprobs, entropy, microbatch, options)
    slow = looped(logprobs, entropy, found, options, 17.0)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        gradient(fast, logprobs), gradient(slow, logprobs), rtol=0, atol=1e-14
    )
    assert gradient(fast, logprobs).abs().max() > 0.01
    if options.entropy:
        wanted, have = gradient(slow, entropy), gradient(fast, entropy)
        torch.testing.assert_close(have, wanted, rtol=0, atol=1e-15)
        assert have.abs().max() > 0.01
    else:
        (unused,) = torch.autograd.grad(fast, entropy, allow_unused=True)
        assert unused is None  # backward must not compute the entropy's part


@pytest.mark.parametrize("options", PLAIN[2:], ids=name)
def test_every_clip_of_these_cases_has_something_to_clip(options: LossOptions) -> None:
    """Otherwise the loop above would agree with a loss that forgot it."""
    microbatch = packed(sequences())
    logprobs = logprobs_near(microbatch)
    loss = loss_of(logprobs, microbatch, options)
    for knob in ("clip_low", "clip_high", "dual_clip"):
        if getattr(options, knob) not in (None, 1.0):
            without = loss_of(logprobs, microbatch, replace(options, **{knob: None}))
            assert (loss - without).abs().item() > 1e-4, knob


@each_loss
def test_prompts_and_padding_have_no_gradient_whatever_stands_there(options: LossOptions) -> None:
    found = sequences()
    microbatch = packed(found)
    assert microbatch.num_tokens > sum(microbatch.lengths)
    logprobs = logprobs_near(microbatch)
    outside = microbatch.loss_mask == 0
    wanted = loss_of(logprobs, microbatch, options)
    for junk in (-1e4, -math.inf, math.inf, math.nan):
        extreme = logprobs.detach().masked_fill(outside, junk).requires_grad_()
        entropy = entropies(microbatch).detach().masked_fill(outside, junk).requires_grad_()
        assert microbatch.reference_logprobs is not None
        spoilt = replace(
            microbatch,
            old_logprobs=microbatch.old_logprobs.masked_fill(outside, -junk),
            reference_logprobs=microbatch.reference_logprobs.masked_fill(outside, -junk),
        )
        for given in (microbatch, spoilt):
            loss = policy_loss(extreme, entropy, given, options)
            grads = [gradient(loss, extreme)]
            if options.entropy:
                grads.append(gradient(loss, entropy))
            for grad in grads:
                assert torch.equal(grad[outside], torch.zeros(int(outside.sum())).double())
                assert bool((microbatch.loss_mask[grad != 0] == 1).all())
            torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-15)


# --------------------------------------------------------------------------- unit losses


@pytest.mark.parametrize("options", UNITS, ids=name)
def test_unit_times_advantage_is_the_gradient_of_the_loss_with_advantages(
    options: LossOptions,
) -> None:
    """What the accumulator relies on, for every loss that it may carry."""
    for index, sequence in enumerate(sequences()):
        microbatch = packed([sequence])
        logprobs = logprobs_near(microbatch, seed=index)
        unit = gradient(loss_of(logprobs, microbatch, options), logprobs)
        whole = gradient(loss_of(logprobs, microbatch, replace(options, unit=False)), logprobs)
        torch.testing.assert_close(sequence.advantage * unit, whole, rtol=0, atol=1e-15)


@pytest.mark.parametrize("options", UNITS, ids=name)
def test_unit_loss_knows_no_advantage(options: LossOptions) -> None:
    found = sequences()
    logprobs = logprobs_near(packed(found))
    others = [replace(sequence, advantage=0.0) for sequence in found]
    losses = [loss_of(logprobs, packed(s), options) for s in (found, others)]
    assert losses[0].item() == losses[1].item() != 0


@pytest.mark.parametrize("kind", SURROGATES)
@pytest.mark.parametrize("knob", ["clip_low", "clip_high", "dual_clip"])
def test_unit_loss_that_clips_by_sign_is_refused_by_name(kind: str, knob: str) -> None:
    microbatch = packed(sequences())
    options = replace(unclipped(kind, unit=True), **{knob: 1.5})
    with pytest.raises(ValueError, match=rf"unit loss '{kind}' with {knob}=1.5"):
        loss_of(logprobs_near(microbatch), microbatch, options)


@pytest.mark.parametrize("knob", ["entropy", "kl"])
def test_unit_loss_with_a_part_without_advantage_is_refused_by_name(knob: str) -> None:
    microbatch = packed(sequences())
    with pytest.raises(ValueError, match=rf"unit loss 'reinforce' with {knob}=0.1"):
        loss_of(logprobs_near(microbatch), microbatch, replace(UNIT, **{knob: 0.1}))


# --------------------------------------------------------------------------- by hand


def one_token(advantage: float, ratio: float) -> tuple[torch.Tensor, Microbatch]:
    """A sequence with one loss token, that has this ratio."""
    sequence = TrainingSequence((5, 6), (0, 1), advantage, (0.0, -2.0))
    logprobs = torch.tensor([-2.0 + math.log(ratio), 0.0], dtype=torch.float64)
    return logprobs.requires_grad_(), pack([sequence], 0, 4.0, CPU)


@pytest.mark.parametrize("kind", SURROGATES)  # a sequence of one token: gspo's ratio, too
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
def test_each_sign_of_advantage_is_clipped_on_its_side(
    kind: str, advantage: float, ratio: float, value: float, moves: bool
) -> None:
    logprobs, microbatch = one_token(advantage, ratio)
    loss = loss_of(logprobs, microbatch, LossOptions(kind, clip_low=0.1, clip_high=0.3))
    assert loss.item() == pytest.approx(-value / 4, abs=1e-12)
    expected = -advantage * ratio / 4 if moves else 0.0
    assert gradient(loss, logprobs).tolist() == pytest.approx([expected, 0.0], abs=1e-12)


@pytest.mark.parametrize(
    ("advantage", "ratio", "value", "moves"),
    [
        (-2.0, 2.5, -5.0, True),
        (-2.0, 4.0, -6.0, False),  # not below c A = -6
        (-2.0, 0.5, -1.8, False),  # the first clip is as before
        (2.0, 4.0, 2.6, False),
        (2.0, 0.5, 1.0, True),
    ],
)
def test_dual_clip_bounds_what_a_token_of_negative_advantage_costs(
    advantage: float, ratio: float, value: float, moves: bool
) -> None:
    logprobs, microbatch = one_token(advantage, ratio)
    options = LossOptions("ppo", clip_low=0.1, clip_high=0.3, dual_clip=3.0)
    loss = loss_of(logprobs, microbatch, options)
    assert loss.item() == pytest.approx(-value / 4, abs=1e-12)
    expected = -advantage * ratio / 4 if moves else 0.0
    assert gradient(loss, logprobs).tolist() == pytest.approx([expected, 0.0], abs=1e-12)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize(("ratio", "weight"), [(0.5, 0.9), (1.1, 1.1), (4.0, 1.3)])
def test_cispo_keeps_the_gradient_of_tokens_out_of_range(
    advantage: float, ratio: float, weight: float
) -> None:
    logprobs, microbatch = one_token(advantage, ratio)
    loss = loss_of(logprobs, microbatch, LossOptions("cispo", clip_low=0.1, clip_high=0.3))
    expected = [-advantage * weight / 4, 0.0]
    assert gradient(loss, logprobs).tolist() == pytest.approx(expected, abs=1e-12)


def test_gspo_shares_the_geometric_mean_of_a_sequences_ratios() -> None:
    """Ratios 4 and 1: s = 2, although no token has it; the prompt's token doesn't count."""
    sequence = TrainingSequence((5, 6, 7, 8), (0, 0, 1, 1), -3.0, (0.0, 0.0, -2.0, -1.0))
    microbatch = pack([sequence], 0, 1.0, CPU)
    logprobs = torch.tensor([-7.0, -2 + math.log(4), -1.0, 0.0], dtype=torch.float64)
    logprobs.requires_grad_()
    loss = loss_of(logprobs, microbatch, LossOptions("gspo", clip_low=0.1, clip_high=0.3))
    assert loss.item() == pytest.approx(2 * 2 * 3)  # two tokens
    assert gradient(loss, logprobs).tolist() == pytest.approx([0, 6, 6, 0])
    good = replace(microbatch, advantages=torch.tensor([3.0]).double())
    loss = loss_of(logprobs, good, LossOptions("gspo", clip_low=0.1, clip_high=0.3))
    assert loss.item() == pytest.approx(-2 * 1.3 * 3)  # clipped: both tokens, not just the first
    assert not gradient(loss, logprobs).any()


def test_gspo_ratios_count_loss_tokens_alone() -> None:
    found = [*sequences(), replace(sequences()[0], loss_mask=(0,) * 7)]
    microbatch = packed(found)
    logprobs = logprobs_near(microbatch)
    ratios = sequence_ratios(
        logprobs, microbatch.old_logprobs, microbatch.loss_mask, microbatch.sequences
    )
    start = 0
    for sequence, ratio in zip(found, ratios.tolist(), strict=True):
        moved = [
            float(logprobs[start + i - 1].detach()) - sequence.old_logprobs[i]
            for i in range(1, len(sequence.tokens))
            if sequence.loss_mask[i]
        ]
        assert ratio == pytest.approx(math.exp(sum(moved) / max(1, len(moved))), rel=1e-14)
        start += len(sequence.tokens)
    assert ratios[-1] == 1
    assert not ratios.requires_grad


@pytest.mark.parametrize("clip", [None, 0.05])
def test_gspo_with_sequence_mean_is_the_papers_objective_of_sequences(clip: float | None) -> None:
    found = [replace(sequence, token_weights=None) for sequence in sequences()]
    weighted, n = aggregate(found, "sequence_mean", 1.0)
    microbatch = packed(weighted, n)
    logprobs = logprobs_near(microbatch)
    objective = torch.zeros((), dtype=torch.float64)
    start = clipped = 0
    for sequence in found:
        at = [i for i in range(len(sequence.tokens)) if sequence.loss_mask[i]]
        old = torch.tensor([sequence.old_logprobs[i] for i in at], dtype=torch.float64)
        s = (logprobs[[start + i - 1 for i in at]] - old).mean().exp()
        terms = [s * sequence.advantage]
        if clip is not None:
            terms.append(s.clamp(1 - clip, 1 + clip) * sequence.advantage)
        objective = objective + torch.stack(terms).min() / len(found)
        clipped += int(clip is not None and float(terms[1].detach()) < float(terms[0].detach()))
        start += len(sequence.tokens)
    assert (clipped > 0) == (clip is not None)
    assert clipped < len(found)
    loss = loss_of(logprobs, microbatch, LossOptions("gspo", clip_low=clip, clip_high=clip))
    torch.testing.assert_close(loss, -objective, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        gradient(loss, logprobs), gradient(-objective, logprobs), rtol=0, atol=1e-15
    )


# --------------------------------------------------------------------------- together


def test_on_policy_losses_with_advantages_have_one_gradient() -> None:
    microbatch = packed(sequences())
    logprobs = microbatch.old_logprobs.clone().requires_grad_()
    plain = gradient(loss_of(logprobs, microbatch, REINFORCE), logprobs)
    for options in PLAIN:
        found = gradient(loss_of(logprobs, microbatch, options), logprobs)
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-15)


@pytest.mark.parametrize("options", [*PENALIZED, *BONUS], ids=name)
def test_a_sequence_without_advantage_still_has_penalty_and_bonus(options: LossOptions) -> None:
    microbatch = packed([replace(sequences()[0], advantage=0.0)])
    logprobs, entropy = logprobs_near(microbatch), entropies(microbatch)
    loss = policy_loss(logprobs, entropy, microbatch, options)
    counted = microbatch.loss_mask > 0
    if options.kl:
        assert gradient(loss, logprobs)[counted].all()
    if options.entropy:
        assert gradient(loss, entropy)[counted].all()


@pytest.mark.parametrize("entropy", [0.0, 0.5])
def test_an_empty_microbatch_has_loss_zero_without_reference(entropy: float) -> None:
    microbatch = pack([], 0, 3.0, CPU, multiple=4)
    logprobs = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    for kind in ("reinforce", "gspo", "cispo", "ppo"):
        loss = loss_of(logprobs, microbatch, LossOptions(kind, kl=0.5, entropy=entropy))
        assert loss.item() == 0
        assert not gradient(loss, logprobs).any()


def test_a_missing_reference_is_refused() -> None:
    found = [replace(sequence, reference_logprobs=None) for sequence in sequences()]
    microbatch = packed(found)
    with pytest.raises(ValueError, match="reference_logprobs"):
        loss_of(logprobs_near(microbatch), microbatch, replace(REINFORCE, kl=0.1))
    rollout = replace(REINFORCE, kl=0.1, kl_reference="rollout")
    assert loss_of(logprobs_near(microbatch), microbatch, rollout).isfinite()


def test_supervised_loss_is_the_mean_cross_entropy_of_the_masked_tokens() -> None:
    found = [replace(sequence, token_weights=None) for sequence in sequences()]
    microbatch = packed(found, float(loss_tokens(found)))
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn((microbatch.num_tokens, 50), generator=generator, dtype=torch.float64)
    logprobs = logits.log_softmax(dim=1).gather(1, microbatch.labels[:, None])[:, 0]
    counted = microbatch.loss_mask > 0
    expected = F.cross_entropy(logits[counted], microbatch.labels[counted])
    loss = loss_of(logprobs, microbatch, SUPERVISED)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-14)


@each_loss
def test_microbatches_that_share_a_denominator_add_up_to_the_whole(options: LossOptions) -> None:
    found = sequences()
    whole = packed(found)
    logprobs, entropy = logprobs_near(whole).detach(), entropies(whole).detach()
    total, start = 0.0, 0
    for part in (found[:1], found[1:]):
        microbatch = packed(part)
        length = sum(microbatch.lengths)
        values, bonus = torch.zeros((2, microbatch.num_tokens), dtype=torch.float64)
        values[:length] = logprobs[start : start + length]
        bonus[:length] = entropy[start : start + length]
        total += float(policy_loss(values, bonus, microbatch, options))
        start += length
    loss = float(policy_loss(logprobs, entropy, whole, options))
    assert total == pytest.approx(loss, abs=1e-14)
    halved = float(policy_loss(logprobs, entropy, replace(whole, denominator=34.0), options))
    assert halved == pytest.approx(loss / 2, abs=1e-14)


@each_loss
def test_loss_keeps_the_precision_of_the_log_probabilities(options: LossOptions) -> None:
    microbatch = packed(sequences())
    wide, entropy = logprobs_near(microbatch).detach(), entropies(microbatch).detach()
    narrow = policy_loss(wide.float(), entropy.float(), microbatch, options)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(
        narrow.double(), policy_loss(wide, entropy, microbatch, options), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("unit", [False, True])
def test_unknown_loss_is_refused_by_name(unit: bool) -> None:
    microbatch = packed(sequences())
    with pytest.raises(ValueError, match="unknown loss 'trpo'"):
        loss_of(logprobs_near(microbatch), microbatch, LossOptions("trpo", unit))


@pytest.mark.parametrize("kind", ["ppo", "grpo", "dr_grpo", "gspo"])
def test_clipped_tokens_are_those_without_a_gradient(kind: str) -> None:
    microbatch = packed(sequences())
    logprobs = logprobs_near(microbatch)
    options = LossOptions(kind, clip_low=0.05, clip_high=0.1)
    grad = gradient(
        policy_loss(logprobs, torch.zeros_like(logprobs), microbatch, options), logprobs
    )
    found = clipped_tokens(logprobs.detach(), microbatch, options)
    assert 0 < int(found.sum()) < int(microbatch.loss_mask.sum())
    pushed = (microbatch.loss_mask > 0) & (token_advantages(microbatch) != 0)
    assert torch.equal(found, pushed & (grad == 0))
    unclipped = replace(options, clip_low=None, clip_high=None)
    assert not clipped_tokens(logprobs.detach(), microbatch, unclipped).any()


def test_cispo_counts_tokens_whose_weight_is_bounded() -> None:
    microbatch = packed(sequences())
    logprobs = logprobs_near(microbatch).detach()
    found = clipped_tokens(logprobs, microbatch, LossOptions("cispo", clip_low=1.0, clip_high=0.1))
    above = (logprobs - microbatch.old_logprobs).exp() > 1.1
    assert torch.equal(found, above & (microbatch.loss_mask > 0))
    assert found.any()
