"""From prompts to scored groups of rollouts, over all replicas."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import batched

import torch

from proma_megatron.policy.model import Policy
from proma_megatron.records import Prompt, Rollout, RolloutGroup, ScoredRollout
from proma_megatron.rollout.generator import SamplingOptions, generate
from proma_megatron.rollout.rewards import RewardError, RewardFunction, score
from proma_megatron.rollout.sampling import noise
from proma_megatron.rollout.tokenizer import Tokenizer


def sample_rollouts(
    policy: Policy,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    samples: int,
    options: SamplingOptions,
    *,
    seed: int,
    step: int,
) -> list[Rollout]:
    """``samples`` rollouts of each prompt of this replica, a prompt's samples side by side."""
    wanted = [(prompt, sample) for prompt in prompts for sample in range(samples)]
    if options.greedy:
        uniform = torch.zeros((len(wanted), 0))
    else:
        uniform = torch.stack(
            [
                noise(seed, step, prompt.problem.id, sample, options.max_new_tokens)
                for prompt, sample in wanted
            ]
        )
    completions = generate(
        policy, [prompt.tokens for prompt, _ in wanted], uniform, tokenizer.eos_id, options
    )
    return [
        Rollout(
            prompt=prompt,
            sample=sample,
            tokens=completion.tokens,
            logprobs=completion.logprobs,
            text=tokenizer.decode(
                completion.tokens[:-1] if completion.finished else completion.tokens
            ),
            finished=completion.finished,
        )
        for (prompt, sample), completion in zip(wanted, completions, strict=True)
    ]


def score_rollouts(
    policy: Policy, rollouts: Sequence[Rollout], reward: RewardFunction
) -> list[ScoredRollout]:
    """Rewards from one rank of each replica, so that a user's function runs once a rollout.

    Raises:
        RewardError: on every rank of every replica, if a reward failed on any of them.
    """
    topology = policy.topology
    outcome: list[float] | RewardError | None = None
    if topology.model.rank == 0:
        try:
            outcome = [scored.reward for scored in score(rollouts, reward)]
        except RewardError as error:
            outcome = error
    outcome = topology.from_model_rank_0(outcome)
    for other in topology.gather_over_data(outcome if isinstance(outcome, RewardError) else None):
        if other is not None:
            raise other
    assert isinstance(outcome, list)
    return [ScoredRollout(rollout, value) for rollout, value in zip(rollouts, outcome, strict=True)]


def group(scored: Sequence[ScoredRollout], samples: int) -> list[RolloutGroup]:
    """Rollouts in the order of `sample_rollouts`, by prompt."""
    return [
        RolloutGroup(members[0].rollout.prompt, members) for members in batched(scored, samples)
    ]
