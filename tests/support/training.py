"""Jobs for the worker pool: forward passes and optimizer steps of a tiny model in some layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from proma_megatron.batching.packing import loss_tokens, pack
from proma_megatron.config.model import ModelConfig, ParallelConfig
from proma_megatron.config.trainer import OptimizerConfig
from proma_megatron.distributed.topology import layout
from proma_megatron.learner.optimizer import Optimizer
from proma_megatron.learner.schedule import Sums, evaluate_logprobs, forward_backward
from proma_megatron.losses.options import REINFORCE
from proma_megatron.model.build import build_policy
from proma_megatron.model.policy import Policy
from proma_megatron.types import Microbatch, TrainingSequence
from proma_megatron.weights.gathering import gather
from proma_megatron.weights.shards import ParameterShard
from support.gradients import VOCAB, Batch

SEED = 7


@dataclass(frozen=True)
class Forward:
    logits: torch.Tensor  # (T, V)
    logprobs: torch.Tensor  # (T,)
    operations: int  # that the forward pass asked of torch


class _Counting(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def packed_forwards(
    device: torch.device, model: ModelConfig, cases: Sequence[tuple[list[TrainingSequence], int]]
) -> list[Forward]:
    """The model on each case: sequences packed and padded to a multiple of so many tokens."""
    with layout(ParallelConfig(), device, SEED) as topology:
        policy = build_policy(model, VOCAB, 64, topology, seed=SEED)
        found = []
        for sequences, multiple in cases:
            microbatch = pack(sequences, 0, 1.0, device, multiple)
            with torch.no_grad(), topology.megatron_calls(), _Counting() as counting:
                logits = policy.forward_packed(policy.chunks[0], microbatch)[0]
            logprobs = evaluate_logprobs(policy, [microbatch])
            assert logprobs is not None
            found.append(Forward(logits.cpu(), logprobs[0].cpu(), counting.count))
        return found


@dataclass(frozen=True)
class Update:
    """Optimizer steps as one rank saw them; tensors by Hugging Face name, on rank 0 only."""

    before: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]  # of the last step, before clipping
    after: dict[str, torch.Tensor]
    metrics: list[dict[str, float]]  # one a step
    sums: Sums
    grad_dtypes: frozenset[torch.dtype]


def optimizer_steps(
    device: torch.device,
    model: ModelConfig,
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    batch: Batch,
    steps: int = 1,
    total_steps: int = 100,
) -> Update:
    """``steps`` plain policy-gradient steps on the same batch, from the seed's weights."""
    with layout(parallel, device, SEED) as topology:
        policy = build_policy(
            model,
            VOCAB,
            64,
            topology,
            seed=SEED,
            distributed_optimizer=optimizer.distributed,
        )
        stepper = Optimizer(policy, optimizer, total_steps)
        microbatches = _of_this_replica(batch, policy)
        before = _gather(policy, "weight")
        gradients: dict[str, torch.Tensor] = {}
        metrics, sums = [], Sums()
        for _ in range(steps):
            sums = forward_backward(policy, microbatches, REINFORCE)
            gradients = _gather(policy, "gradient")
            metrics.append(stepper.step())
        dtypes = frozenset(
            shard.parameter.main_grad.dtype  # type: ignore[attr-defined]
            for shard in policy.shards
        )
        return Update(before, gradients, _gather(policy, "weight"), metrics, sums, dtypes)


def _of_this_replica(batch: Batch, policy: Policy) -> list[Microbatch]:
    topology = policy.topology
    denominator = float(loss_tokens([sequence for part in batch for sequence in part]))
    multiple = policy.token_multiple
    mine = batch[topology.data.rank :: topology.data.size]
    return [
        pack(sequences, index, denominator, topology.device, multiple)
        for index, sequences in enumerate(mine)
    ]


def _gather(policy: Policy, what: str) -> dict[str, torch.Tensor]:
    def read(shard: ParameterShard) -> torch.Tensor:
        if what == "weight":
            return shard.parameter
        return shard.parameter.main_grad  # type: ignore[attr-defined]

    full = gather(policy.shards, read, policy.model, policy.vocab_size, policy.topology)
    return {name: value.clone() for name, value in full.items()}
