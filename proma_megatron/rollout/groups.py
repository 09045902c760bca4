"""From prompts to scored groups of rollouts, over all replicas."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import batched
from typing import Any

import torch

from proma_megatron.data.tokenizer import Tokenizer
from proma_megatron.distributed.topology import Topology
from proma_megatron.errors import RewardError
from proma_megatron.model.policy import Policy
from proma_megatron.rewards.pool import Scorer
from proma_megatron.rollout.engine import Interrupt, SamplingOptions
from proma_megatron.rollout.megatron import generate
from proma_megatron.rollout.sampling import noise
from proma_megatron.types import Prompt, Rollout, RolloutGroup, ScoredRollout


def sample_rollouts(
    policy: Policy,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    samples: int,
    options: SamplingOptions,
    *,
    seed: int,
    step: int,
    first: int = 0,
    interrupt: Interrupt | None = None,
) -> list[Rollout]:
    """Sample ``samples`` rollouts of each prompt of this replica, a prompt's samples side by side.

    Args:
        first: place, among the step's prompts, of the first prompt of all replicas.
        interrupt: as `generate` takes it.

    Raises:
        Interrupted: as `generate` does.
    """
    wanted = [(prompt, sample) for prompt in prompts for sample in range(samples)]
    # A prompt's place among those of all replicas (`shard_for_replica`): the same in every layout.
    axis = policy.topology.data
    start = first + axis.rank
    places = range(start, start + axis.size * len(prompts), axis.size)
    if options.greedy or not wanted:
        uniform = torch.zeros((len(wanted), 0))
    else:
        uniform = torch.stack(
            [
                noise(seed, step, place, sample, options.max_new_tokens)
                for place in places
                for sample in range(samples)
            ]
        )
    completions = generate(
        policy,
        [prompt.tokens for prompt, _ in wanted],
        uniform,
        tokenizer.stop_ids,
        options,
        interrupt,
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
    topology: Topology, rollouts: Sequence[Rollout], scorer: Scorer
) -> list[ScoredRollout]:
    """Score on one rank of each replica, so that a user's function runs once a rollout.

    Raises:
        RewardError: on every rank of every replica, if a reward failed on any of them.
    """
    outcome: list[tuple[float, float, bool]] | RewardError | None = None
    if topology.model.rank == 0:
        try:
            outcome = [(s.reward, s.score, s.timed_out) for s in scorer.score(rollouts)]
        except RewardError as error:
            outcome = error
    outcome = topology.from_model_rank_0(outcome)
    for other in topology.gather_over_data(outcome if isinstance(outcome, RewardError) else None):
        if other is not None:
            raise other
    assert isinstance(outcome, list)
    return [
        ScoredRollout(rollout, *found) for rollout, found in zip(rollouts, outcome, strict=True)
    ]


def shard_for_replica(prompts: Sequence[Prompt], topology: Topology) -> list[Prompt]:
    """Return this replica's part of the prompts: every n-th."""
    return list(prompts[topology.data.rank :: topology.data.size])


def group(scored: Sequence[ScoredRollout], samples: int) -> list[RolloutGroup]:
    """Group rollouts in the order of `sample_rollouts` by prompt."""
    return [
        RolloutGroup(members[0].rollout.prompt, members) for members in batched(scored, samples)
    ]


def rollout_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Return rewards and lengths of a step's rollouts."""
    scored = [sample for found in groups for sample in found.samples]
    rewards = torch.tensor([sample.reward for sample in scored], dtype=torch.float64)
    lengths = [len(sample.rollout.tokens) for sample in scored]
    equal = sum(len({sample.reward for sample in found.samples}) == 1 for found in groups)
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std(correction=0)),
        "reward/correct": sum(s.correct for s in scored) / len(scored),
        "reward/timeouts": float(sum(s.timed_out for s in scored)),
        "reward/equal_groups": equal / len(groups),
        "rollout/length": sum(lengths) / len(lengths),
        "rollout/truncated": sum(not s.rollout.finished for s in scored) / len(scored),
    }


def first_samples(groups: Sequence[RolloutGroup], count: int) -> tuple[dict[str, Any], ...]:
    """Return the first rollout of the first groups, for a reader."""
    chosen = [found.samples[0] for found in groups[:count]]
    return tuple(
        {
            "problem": sample.rollout.prompt.problem.id,
            "prompt": sample.rollout.prompt.text,
            "completion": sample.rollout.text,
            "answer": sample.rollout.prompt.problem.answer,
            "reward": sample.reward,
            "finished": sample.rollout.finished,
        }
        for sample in chosen
    )
