"""Jobs for the worker pool: what each rank of a layout holds, and filling and gathering it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from proma_megatron.config import ModelConfig, ParallelConfig
from proma_megatron.policy.model import build_policy
from proma_megatron.policy.parameters import Run, fill, gather
from proma_megatron.topology import layout
from support.gradients import VOCAB, random_weights


@dataclass(frozen=True)
class LocalShard:
    """A `ParameterShard` that can leave its process."""

    name: str
    shape: tuple[int, ...]
    axis: int
    runs: tuple[Run, ...]
    reduction: str
    tensor_rank: int


def local_shards(
    device: torch.device, model: ModelConfig, parallel: ParallelConfig
) -> list[LocalShard]:
    with layout(parallel, device, 0) as topology:
        policy = build_policy(model, VOCAB, 64, topology, seed=0)
        return [
            LocalShard(
                name=shard.name,
                shape=tuple(shard.parameter.shape),
                axis=shard.axis,
                runs=shard.runs,
                reduction=shard.reduction.value,
                tensor_rank=topology.tensor.rank,
            )
            for shard in policy.shards
        ]


def filled_then_gathered(
    device: torch.device, model: ModelConfig, parallel: ParallelConfig, seed: int
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What `gather` reads after `fill` over NaN, and the parameters with NaN left in them."""
    with layout(parallel, device, seed) as topology:
        policy = build_policy(model, VOCAB, 64, topology, seed=seed)
        with torch.no_grad():
            for shard in policy.shards:
                shard.parameter.fill_(torch.nan)
        fill(policy.shards, random_weights(model, seed).__getitem__)
        left = [s.name for s in policy.shards if not s.parameter.isfinite().all()]
        full = gather(policy.shards, lambda shard: shard.parameter, model, VOCAB, topology)
        return full, left


def initial_weights(
    device: torch.device, model: ModelConfig, parallel: ParallelConfig, seed: int
) -> dict[str, torch.Tensor]:
    """The unsharded weights of a policy as it is built."""
    with layout(parallel, device, seed) as topology:
        policy = build_policy(model, VOCAB, 64, topology, seed=seed)
        return gather(policy.shards, lambda shard: shard.parameter, model, VOCAB, topology)
