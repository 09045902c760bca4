"""Jobs for the worker pool: what each rank of a layout holds, and filling and gathering it."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from proma_megatron.config.model import ModelConfig, ParallelConfig
from proma_megatron.distributed.topology import layout
from proma_megatron.model.build import build_policy
from proma_megatron.weights.filling import fill
from proma_megatron.weights.gathering import gather
from proma_megatron.weights.mapping import parameter_shards
from proma_megatron.weights.shards import Run
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


def refusals(
    device: torch.device, model: ModelConfig, parallel: ParallelConfig, denied: ModelConfig
) -> tuple[str, str]:
    """Of a last layer with a parameter too many, and of one that the configuration denies."""
    with layout(parallel, device, 0) as topology:
        policy = build_policy(model, VOCAB, 64, topology, seed=0)
        chunk: Any = policy.modules[-1]

        def refusal(configuration: ModelConfig) -> str:
            try:
                parameter_shards(chunk, configuration, VOCAB, topology)
            except ValueError as error:
                return str(error)
            return ""

        of_denied = refusal(denied)
        chunk.decoder.layers[-1].mlp.extra = torch.nn.Parameter(torch.zeros(1))
        return refusal(model), of_denied


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


def bytes_gathered(device: torch.device, model: ModelConfig) -> tuple[int, int]:
    """Bytes that this rank sends of its gradients, in tensors and in all, over two stages."""
    with layout(ParallelConfig(pipeline=2), device, 0) as topology:
        policy = build_policy(model, VOCAB, 64, topology, seed=0)
        tensors = objects = 0
        send, gather_object = dist.send, dist.gather_object

        def counting_send(value: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            nonlocal tensors
            tensors += value.untyped_storage().nbytes()
            send(value, *args, **kwargs)

        def counting_gather(local: object, *args: Any, **kwargs: Any) -> None:
            nonlocal objects
            objects += len(pickle.dumps(local))
            gather_object(local, *args, **kwargs)

        dist.send, dist.gather_object = counting_send, counting_gather
        try:
            gather(
                policy.shards,
                lambda shard: shard.parameter.main_grad,  # type: ignore[attr-defined]
                model,
                VOCAB,
                topology,
            )
        finally:
            dist.send, dist.gather_object = send, gather_object
        return tensors, tensors + objects
