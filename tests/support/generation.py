"""Jobs for the worker pool: completions of a tiny model in some layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from proma_megatron.batching.packing import pack
from proma_megatron.config.model import ModelConfig, ParallelConfig
from proma_megatron.distributed.topology import layout
from proma_megatron.learner.schedule import evaluate_logprobs, forward_backward
from proma_megatron.losses.options import UNIT
from proma_megatron.model.build import build_policy
from proma_megatron.model.policy import Policy
from proma_megatron.rollout import megatron as generator
from proma_megatron.rollout.engine import Completion, SamplingOptions
from proma_megatron.rollout.megatron import generate
from proma_megatron.rollout.sampling import sample_shard
from proma_megatron.types import Microbatch, TrainingSequence
from proma_megatron.weights.gathering import gather

SEED = 11
NO_EOS = -1


@dataclass(frozen=True)
class Case:
    """One call of `generate` on some of a job's prompts."""

    options: SamplingOptions
    rows: tuple[int, ...]
    eos: int = NO_EOS
    also: tuple[int, ...] = ()  # other tokens that end a completion
    keep_fraction: float = generator.KEPT_ROWS


@dataclass(frozen=True)
class Decoded:
    completions: list[Completion]
    decoding: list[tuple[int, int]]  # shape of the input tokens of every forward


def generations(
    device: torch.device,
    model: ModelConfig,
    parallel: ParallelConfig,
    vocab_size: int,
    prompts: Sequence[tuple[int, ...]],
    noise: torch.Tensor,
    cases: Sequence[Case],
) -> list[Decoded]:
    """What each case generates; prompt i draws with row i of the (prompts, n) noise."""
    with layout(parallel, device, SEED) as topology:
        policy = build_policy(model, vocab_size, 64, topology, seed=SEED)
        found = []
        for case in cases:
            rows = list(case.rows)
            with _watched(case.keep_fraction) as decoding:
                stops = [case.eos, *case.also]
                completions = generate(
                    policy, [prompts[i] for i in rows], noise[rows], stops, case.options
                )
            found.append(Decoded(completions, decoding))
        return found


@contextlib.contextmanager
def _watched(keep_fraction: float) -> Iterator[list[tuple[int, int]]]:
    """The shape of every forward's input tokens, under this threshold of compaction."""
    shapes: list[tuple[int, int]] = []
    forward = generator._next_logits

    def watch(policy: Policy, cache: generator.KeyValueCache, inputs: torch.Tensor, **options: Any):
        shapes.append((inputs.shape[0], inputs.shape[1]))
        return forward(policy, cache, inputs, **options)

    with (
        mock.patch.object(generator, "_next_logits", watch),
        mock.patch.object(generator, "KEPT_ROWS", keep_fraction),
    ):
        yield shapes


@dataclass(frozen=True)
class Agreement:
    """Log-probabilities of sampled tokens by both paths, flat; from the last pipeline stage."""

    sampled: list[float]
    trained: list[float]
    trained_before: list[float]  # by the same forward, before anything was generated


def sampled_and_trained_logprobs(
    device: torch.device,
    model: ModelConfig,
    parallel: ParallelConfig,
    vocab_size: int,
    prompts: Sequence[tuple[int, ...]],
    noise: torch.Tensor,
    options: SamplingOptions,
) -> Agreement | None:
    """The generator's log-probabilities, and the training forward's of the same tokens."""
    with layout(parallel, device, SEED) as topology:
        policy = build_policy(model, vocab_size, 64, topology, seed=SEED)
        completions = generate(policy, prompts, noise, [NO_EOS], options)
        microbatches = _microbatches(prompts, completions, policy)
        after = evaluate_logprobs(policy, microbatches, options.temperature)
        fresh = build_policy(model, vocab_size, 64, topology, seed=SEED)
        before = evaluate_logprobs(fresh, microbatches, options.temperature)
        if after is None or before is None:
            return None

        def counted(values: list[torch.Tensor]) -> list[float]:
            pairs = zip(values, microbatches, strict=True)
            return [x for found, m in pairs for x in found[m.loss_mask > 0].tolist()]

        sampled = [x for completion in completions for x in completion.logprobs]
        return Agreement(sampled, counted(after), counted(before))


def gradients_around_a_rollout(
    device: torch.device,
    model: ModelConfig,
    parallel: ParallelConfig,
    vocab_size: int,
    prompts: Sequence[tuple[int, ...]],
    noise: torch.Tensor,
    options: SamplingOptions,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients on a policy's own rollouts, before and after it generates once more."""
    with layout(parallel, device, SEED) as topology:
        completions = generate(
            build_policy(model, vocab_size, 64, topology, seed=SEED),
            prompts,
            noise,
            [NO_EOS],
            options,
        )
        policy = build_policy(model, vocab_size, 64, topology, seed=SEED)
        microbatches = _microbatches(prompts, completions, policy)

        def gradients() -> dict[str, torch.Tensor]:
            forward_backward(policy, microbatches, UNIT)
            full = gather(
                policy.shards,
                lambda shard: shard.parameter.main_grad,  # type: ignore[attr-defined]
                model,
                vocab_size,
                topology,
            )
            return {name: value.clone() for name, value in full.items()}

        before = gradients()
        generate(policy, prompts, noise, [NO_EOS], options)
        return before, gradients()


def _microbatches(
    prompts: Sequence[tuple[int, ...]], completions: Sequence[Completion], policy: Policy
) -> list[Microbatch]:
    """Two sequences each, in order; an even number of them, for two interleaved stages."""
    sequences = []
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = (*prompt, *completion.tokens)
        mask = (0,) * len(prompt) + (1,) * len(completion.tokens)
        sequences.append(TrainingSequence(tokens, mask, 0.0, (0.0,) * len(tokens)))
    topology = policy.topology
    multiple = policy.token_multiple
    starts = range(0, len(sequences), 2)
    assert len(starts) % 2 == 0
    return [
        pack(sequences[start : start + 2], index, 1.0, topology.device, multiple)
        for index, start in enumerate(starts)
    ]


def draws_from_shards(
    device: torch.device,
    parallel: ParallelConfig,
    logits: torch.Tensor,
    uniform: torch.Tensor | None,
    temperature: float,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sample_shard` of (b, V) logits, each rank with its columns, added up."""
    with layout(parallel, device, SEED) as topology:
        width = -(-logits.shape[1] // topology.tensor.size)
        first = topology.tensor.rank * width
        mine = logits[:, first : first + width]
        found = sample_shard(mine, first, uniform, temperature, top_k, topology.tensor)
        for part in found:
            dist.all_reduce(part, group=topology.tensor.group)
        return found
