"""Jobs for the worker pool: what the learner makes of one batch, in some layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from proma_megatron.config.loading import validate_config
from proma_megatron.config.model import ModelConfig, ParallelConfig
from proma_megatron.config.run import RunConfig
from proma_megatron.distributed.topology import Topology, layout
from proma_megatron.learner.divergences import Divergences
from proma_megatron.learner.learner import Learner
from proma_megatron.learner.references import ReferencePolicies
from proma_megatron.learner.schedule import Sums
from proma_megatron.learner.snapshots import LaggedMean, WeightSnapshot
from proma_megatron.model.build import build_policy
from proma_megatron.model.policy import Policy
from proma_megatron.projection.accumulator import Accumulator
from proma_megatron.types import TrainingSequence
from proma_megatron.weights.gathering import gather
from proma_megatron.weights.shards import ParameterShard
from support.gradients import VOCAB

SEED = 7
Tensors = dict[str, torch.Tensor]  # by Hugging Face name, on rank 0 only


def learning(model: ModelConfig, parallel: ParallelConfig, tree: dict[str, Any]) -> RunConfig:
    """A configuration of this tree for this model in this layout."""
    sections: dict[str, Any] = {
        "name": "learning",
        "model": model.model_dump(),
        "parallel": parallel.model_dump(),
        "rollout": {"prompts_per_step": 4, "max_prompt_tokens": 8, "max_new_tokens": 12},
        "batching": {"tokens_per_microbatch": 64, "minibatches": 2},
    }
    for key, value in tree.items():
        old = sections.get(key)
        sections[key] = {**old, **value} if isinstance(old, dict) else value
    return validate_config(sections, training=True)


def _policy(model: ModelConfig, topology: Topology) -> Policy:
    return build_policy(model, VOCAB, 64, topology, seed=SEED)


def gathered(policy: Policy, what: str) -> Tensors:
    def read(shard: ParameterShard) -> torch.Tensor:
        if what == "weight":
            return shard.parameter
        return shard.parameter.main_grad  # type: ignore[attr-defined]

    full = gather(policy.shards, read, policy.model, policy.vocab_size, policy.topology)
    return {name: value.cpu().clone() for name, value in full.items()}


def minibatch_gradients(
    device: torch.device,
    model: ModelConfig,
    parallel: ParallelConfig,
    trees: Sequence[dict[str, Any]],
    sequences: list[TrainingSequence],
) -> list[tuple[Tensors, Sums]]:
    """The gradient of one minibatch under each of these configurations, and its sums."""
    found = []
    with layout(parallel, device, SEED) as topology:
        policy = _policy(model, topology)
        for tree in trees:
            config = learning(model, parallel, tree)
            accumulator = None
            if config.projects:
                accumulator = Accumulator.of(policy, config.projection)
            learner = Learner(config, policy, accumulator)
            sums = learner.gradients(sequences, config.loss.kl.coefficient)
            found.append((gathered(policy, "gradient"), sums))
    return found


def looks(
    device: torch.device,
    model: ModelConfig,
    parallel: ParallelConfig,
    sequences: list[TrainingSequence],
    shift: float,
) -> dict[str, Any]:
    """What learner, references and divergences say of a policy whose weights then change."""
    with layout(parallel, device, SEED) as topology:
        policy = _policy(model, topology)
        tree = {
            "algorithm": "grpo",
            "loss": {"kl": {"coefficient": 0.5}, "mismatch": "token"},
            "trainer": {"kl_lagged_every": 1, "steps": 9},
        }
        config = learning(model, parallel, tree)
        learner = Learner(config, policy)
        references = ReferencePolicies(config, learner)
        divergences = Divergences(config, learner, of_every_step=True)
        initial = divergences.initial = WeightSnapshot(policy)
        before = learner.logprobs(sequences)
        weights = gathered(policy, "weight")
        sampled = [
            replace(s, old_logprobs=found, reference_logprobs=None)
            for s, found in zip(sequences, before, strict=True)
        ]
        found: dict[str, Any] = {"before": before, "own": learner.divergence(sampled)}
        found["lagged"] = [divergences.to_lagged(1, [sampled])["policy/kl_lagged"]]
        _move(policy, shift)
        found["after"] = learner.logprobs(sequences)
        found["moved"] = divergences.after_step(1, [sampled])
        found["lagged"].append(divergences.to_lagged(2, [sampled])["policy/kl_lagged"])
        found["batch"] = references.attach([sequences], initial)[0][0]
        forgetful = [replace(s, reference_logprobs=None) for s in found["batch"]]
        found["initial"] = [divergences.after_step(1, [forgetful])["policy/kl_initial"]]
        divergences.of_every_step = False
        with mock.patch.object(learner, "_evaluated", side_effect=AssertionError("a forward pass")):
            found["initial"].append(
                divergences.after_step(1, [found["batch"]])["policy/kl_initial"]
            )
        with initial.in_place():
            inside = gathered(policy, "weight")
        restored = gathered(policy, "weight")
        found["swap"] = [
            (
                name,
                torch.equal(inside[name], weights[name]),
                torch.equal(restored[name], inside[name]),
            )
            for name in weights
        ]
        return found


def running_mean(
    device: torch.device, model: ModelConfig, shifts: Sequence[float], steps: int
) -> tuple[list[float], list[float]]:
    """Largest error of the running mean of moved weights after each move, and its count."""
    with layout(ParallelConfig(), device, SEED) as topology:
        policy = _policy(model, topology)
        mean = LaggedMean(policy, steps)
        start = [shard.parameter.detach().clone() for shard in policy.shards]
        expected, errors, counts = 0.0, [], []
        for index, shift in enumerate(shifts):
            _move(policy, shift)
            total = sum(shifts[: index + 1])
            n = min(index + 1, steps)
            expected += (total - expected) / n
            mean.add()
            with mean.in_place():
                errors.append(
                    max(
                        float((shard.parameter - old - expected).abs().max())
                        for shard, old in zip(policy.shards, start, strict=True)
                    )
                )
            counts.append(float(mean.count))
        return errors, counts


@torch.no_grad()
def _move(policy: Policy, shift: float) -> None:
    """Change every weight by the same amount, in every layout alike."""
    for shard in policy.shards:
        shard.parameter.add_(shift)
