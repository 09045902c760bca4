"""What each algorithm is made of, and what goes together: the one place that decides.

An algorithm is a policy loss and a way to accumulate gradients. Without an accumulator of ours any
loss goes. With one, backward carries *unit* losses, sequence by sequence without their advantages,
and the accumulator multiplies advantages with the weight gradients of whole sequences. That is
exact where the gradient of a sequence's loss is its advantage times something that doesn't know
the advantage: a loss whose weights on tokens are the same whatever the advantage's sign. Clipping
on one side for each sign is not, nor is an entropy bonus or a KL penalty in the loss, which have no
advantage at all; those are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator

from proma_megatron.config.choices import (
    ACCUMULATIONS,
    ESTIMATORS,
    LOSSES,
    RULES,
    either,
    rules_of,
)
from proma_megatron.config.sections import RunSections, loss_kind, normalizes_std


def combination_problems(config: RunSections) -> Iterator[str]:
    """Yield why algorithm, accumulation and loss don't go together."""
    yield from _accumulation_problems(config)
    yield from _loss_problems(config)
    if config.projects:
        yield from _unit_loss_problems(config)


def _accumulation_problems(config: RunSections) -> Iterator[str]:
    algorithm, projection, model = config.algorithm, config.projection, config.model
    rules, owner = rules_of(algorithm), RULES[projection.rule].algorithm
    if not rules:
        # PROMA's rules stay in files whose runs differ in the algorithm alone.
        if owner != "proma":
            yield (
                f"projection.rule is {projection.rule} with algorithm={algorithm}, which does not "
                f"use it; use algorithm={owner}, or leave projection.rule out"
            )
        return
    if projection.rule not in rules:
        yield (
            f"projection.rule is {projection.rule} with algorithm={algorithm}, which "
            f"{ACCUMULATIONS[algorithm].does}; use {either(rules)}, or algorithm={owner}"
        )
    narrow = min(model.hidden_size, model.kv_heads * model.head_dim, model.ffn_hidden_size)
    if projection.by_subspaces and projection.rank >= narrow:
        yield (
            f"projection.rank is {projection.rank}, but the smallest weight has only {narrow} "
            "rows or columns, which would all be removed; use a smaller rank"
        )


def _loss_problems(config: RunSections) -> Iterator[str]:
    loss, kind, algorithm = config.loss, loss_kind(config), config.algorithm
    if loss.kind is not None and algorithm not in ACCUMULATIONS and loss.kind != algorithm:
        yield (
            f"loss.kind is {loss.kind} with algorithm={algorithm}, which has a loss of its own; "
            f"use algorithm={loss.kind}, or leave loss.kind out"
        )
    facts = LOSSES[kind]
    if facts.ratio == "sequence" and loss.ratio == "token":
        yield (
            f"loss.ratio is token with the loss {kind}, whose ratio and clipping are of whole "
            "sequences; use ppo or grpo to clip tokens, or leave loss.ratio out"
        )
    if loss.ratio == "sequence" and facts.ratio == "token":
        yield (
            f"loss.ratio is sequence with the loss {kind}, whose ratio is of single tokens; use "
            "gspo for ratios of sequences"
        )
    if loss.dual_clip is not None and not facts.dual_clip:
        yield (
            f"loss.dual_clip is {loss.dual_clip} with the loss {kind}, which it is not defined "
            f"for; use {either(name for name, other in LOSSES.items() if other.dual_clip)}, or null"
        )
    if loss.dual_clip is not None and not loss.clip:
        yield (
            f"loss.dual_clip is {loss.dual_clip} with loss.clip=false; clip, or set "
            "loss.dual_clip to null"
        )
    if loss.kl.place == "reward" and loss.kl.reference == "rollout" and loss.kl.coefficient:
        yield (
            "loss.kl.reference is rollout with loss.kl.place=reward, where the policy is the "
            "rollout's and the penalty always 0; use reference=initial, or place=loss"
        )
    kl = (loss.kl.estimator, loss.kl.place, loss.kl.reference)
    if loss.kl.coefficient and kl == ("k1", "loss", "initial"):
        yield (
            "loss.kl.estimator is k1 in the loss against the initial policy, where its gradient is "
            "0 in expectation; use k2 or k3, or loss.kl.place=reward"
        )
    if loss.kl.coefficient and kl[1:] == ("loss", "rollout") and config.batching.minibatches == 1:
        yield (
            "loss.kl.reference is rollout in the loss with batching.minibatches=1, where the "
            "policy is still the one that sampled; use at least 2 minibatches, or "
            "loss.kl.reference=initial"
        )
    if config.batching.zero_advantage == "drop" and (
        loss.entropy or (loss.kl.coefficient and loss.kl.place == "loss")
    ):
        yield (
            "batching.zero_advantage is drop with an entropy bonus or a KL penalty in the loss, "
            "which sequences of advantage 0 have as well; use keep"
        )
    if loss.kl.target is not None and not loss.kl.coefficient:
        yield (
            f"loss.kl.target is {loss.kl.target} with loss.kl.coefficient=0, which doubling "
            "leaves at 0; give a first coefficient such as 1"
        )


def _unit_loss_problems(config: RunSections) -> Iterator[str]:
    """Yield why sequence gradients of this loss don't know their advantage only as a factor."""
    loss, kind, algorithm = config.loss, loss_kind(config), config.algorithm
    if LOSSES[kind].sign_dependent and loss.clip:
        yield (
            f"loss.kind is {kind} with algorithm={algorithm}: it clips on one side for each sign "
            "of the advantage, so a sequence's gradient is not its advantage times one direction; "
            "use loss.kind=cispo or reinforce, or loss.clip=false"
        )
    if loss.entropy:
        yield (
            f"loss.entropy is {loss.entropy} with algorithm={algorithm}: the bonus has no "
            "advantage that the accumulator could multiply with; use 0, or algorithm=reinforce"
        )
    if loss.kl.coefficient and loss.kl.place == "loss":
        yield (
            f"loss.kl.coefficient is {loss.kl.coefficient} with algorithm={algorithm}: a penalty "
            "in the loss has no advantage that the accumulator could multiply with; use "
            "loss.kl.place=reward, or algorithm=reinforce"
        )


def estimator_problems(config: RunSections) -> Iterator[str]:
    """Yield why advantages can't be estimated from the samples of a step."""
    advantage, samples = config.advantage, config.rollout.samples_per_prompt
    facts = ESTIMATORS[advantage.estimator]
    if samples < facts.samples:
        yield (
            f"rollout.samples_per_prompt is {samples}, expected at least {facts.samples}: "
            "advantages are "
            f"relative to the other samples of a prompt (advantage.estimator={advantage.estimator})"
        )
    if advantage.normalize_std and not facts.can_normalize:
        yield (
            f"advantage.normalize_std is true with advantage.estimator={advantage.estimator}, "
            "which does not divide; use leave_one_out, or leave normalize_std out"
        )
    if normalizes_std(config) and facts.samples <= samples < facts.samples_to_normalize:
        yield (
            f"rollout.samples_per_prompt is {samples} with the standard deviation of the other "
            f"samples, expected at least {facts.samples_to_normalize}; use more samples, or "
            "normalize_std=false"
        )
    if loss_kind(config) == "dr_grpo" and normalizes_std(config):
        key = "normalize_std is true"
        if advantage.normalize_std is None:
            key = f"estimator is {advantage.estimator}, which divides by a standard deviation,"
        yield (
            f"advantage.{key} with the loss dr_grpo, which is GRPO without that division; use "
            "grpo, or advantage.normalize_std=false"
        )
