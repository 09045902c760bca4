"""Jobs for the worker pool: write a checkpoint in one layout, read it in another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from proma_megatron.batching.packing import pack
from proma_megatron.checkpoint import load_checkpoint, save_checkpoint
from proma_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from proma_megatron.policy.gathering import gather
from proma_megatron.policy.losses.options import REINFORCE
from proma_megatron.policy.model import Policy, build_policy
from proma_megatron.policy.optimizer import Optimizer
from proma_megatron.policy.schedule import forward_backward
from proma_megatron.snapshots import WeightSnapshot
from proma_megatron.topology import Topology, layout
from support.gradients import VOCAB, random_batch

Weights = dict[str, torch.Tensor]


def _build(
    model: ModelConfig, topology: Topology, config: OptimizerConfig, seed: int
) -> tuple[Policy, Optimizer]:
    policy = build_policy(
        model, VOCAB, 64, topology, seed=seed, distributed_optimizer=config.distributed
    )
    return policy, Optimizer(policy, config, total_steps=10)


def _weights(policy: Policy) -> Weights:
    return gather(
        policy.shards, lambda shard: shard.parameter, policy.model, VOCAB, policy.topology
    )


def _step(policy: Policy, optimizer: Optimizer, seed: int) -> None:
    """One plain optimizer step on a random batch that is alike in every layout."""
    topology = policy.topology
    batch = random_batch(seed, [2, 2, 2, 2])
    mine = batch[topology.data.rank :: topology.data.size]
    multiple = topology.tensor.size if topology.sequence_parallel else 1
    microbatches = [
        pack(sequences, index, 40.0, topology.device, multiple)
        for index, sequences in enumerate(mine)
    ]
    forward_backward(policy, microbatches, REINFORCE)
    optimizer.step()


def write(
    device: torch.device,
    path: Path,
    model: ModelConfig,
    parallel: ParallelConfig,
    config: OptimizerConfig,
) -> tuple[Weights, Weights]:
    """Two steps, a checkpoint, one more step: the weights at the checkpoint and after."""
    with layout(parallel, device, seed=0) as topology:
        policy, optimizer = _build(model, topology, config, seed=1)
        _step(policy, optimizer, seed=10)
        _step(policy, optimizer, seed=11)
        save_checkpoint(path, policy, optimizer, {"step": 2})
        saved = _weights(policy)
        _step(policy, optimizer, seed=12)
        return saved, _weights(policy)


def read(
    device: torch.device,
    path: Path,
    model: ModelConfig,
    parallel: ParallelConfig,
    config: OptimizerConfig,
) -> tuple[dict[str, Any], Weights, Weights]:
    """The state and weights as loaded, and the weights after one more step."""
    with layout(parallel, device, seed=0) as topology:
        policy, optimizer = _build(model, topology, config, seed=2)
        state = load_checkpoint(path, policy, optimizer)
        loaded = _weights(policy)
        _step(policy, optimizer, seed=12)
        return state, loaded, _weights(policy)


def swap(device: torch.device, model: ModelConfig) -> tuple[Weights, Weights, Weights, Weights]:
    """Weights before a step, after it, inside a snapshot of those before, and after leaving it."""
    with layout(ParallelConfig(), device, seed=0) as topology:
        policy, optimizer = _build(model, topology, OptimizerConfig(), seed=1)
        snapshot = WeightSnapshot(policy)

        def now() -> Weights:
            return {name: value.clone() for name, value in _weights(policy).items()}

        before = now()
        _step(policy, optimizer, seed=10)
        after = now()
        with snapshot.in_place():
            inside = now()
        return before, after, inside, now()
