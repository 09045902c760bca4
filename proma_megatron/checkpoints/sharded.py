"""What a checkpoint holds, as Megatron's dist_checkpointing wants it described: shards by name.

Weights, optimizer and the running mean of earlier weights can be read in any layout. States of
random number generators and what delayed scaling remembers belong to a rank, and mean something
only in the layout that saved them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensorFactory

from proma_megatron.checkpoints.random_state import (
    State,
    random_state,
    restore_random_state,
)
from proma_megatron.learner.optimizer import Optimizer
from proma_megatron.learner.snapshots import LaggedMean
from proma_megatron.model.policy import Policy

_RANDOM = "random."
_SCALING = "scaling."


@dataclass(frozen=True)
class Contents:
    """What goes into a checkpoint, or comes out of it."""

    policy: Policy
    optimizer: Optimizer | None = None
    lagged: LaggedMean | None = None
    random: bool = False  # states of the random number generators
    scaling: bool = False  # what delayed scaling remembers of earlier passes

    @property
    def names(self) -> tuple[str, ...]:
        """What is there beside the weights."""
        found = {
            "optimizer": self.optimizer is not None,
            "lagged": self.lagged is not None,
            "random": self.random,
            "scaling": self.scaling,
        }
        return tuple(name for name, there in found.items() if there)


def shards(contents: Contents, *, loading: bool) -> dict[str, Any]:
    """Build the sharded state dict of these contents; its tensors are the run's own, no copies."""
    policy = contents.policy
    metadata = {
        "dp_cp_group": policy.topology.data.group,
        # Optimizer state that another layout can read.
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
    }
    model = {
        _key(index): module.sharded_state_dict(metadata=metadata)
        for index, module in enumerate(policy.modules)
    }
    state: dict[str, Any] = dict(model)
    if contents.optimizer is not None:
        if loading and contents.optimizer.config.distributed:
            contents.optimizer.allocate()
        everything = model if len(model) > 1 else model[_key(0)]
        state["optimizer"] = contents.optimizer.optimizer.sharded_state_dict(
            everything, is_loading=loading, metadata=metadata
        )
        state["scheduler"] = contents.optimizer.scheduler.state_dict()
    if contents.lagged is not None:
        state["lagged"] = _mean_shards(policy, contents.lagged, metadata)
    if contents.random:
        state["random"] = _random_shards(policy)
    if contents.scaling:
        state["scaling"] = _scaling_shard(policy)
    return state


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """Return the same description over copies of the tensors that lie in host memory.

    Training changes them while they are written. Those on a GPU are copied to the host by
    Megatron's writer, before it returns.
    """
    for entry in nested_values(state):
        data = getattr(entry, "data", None)
        if (
            isinstance(entry, ShardedBase)
            and isinstance(data, torch.Tensor)
            and data.device.type == "cpu"
        ):
            entry.data = data.detach().clone()
    return state


def load_shards(path: str, contents: Contents) -> None:
    """Read these contents, of which the checkpoint must have all, into this layout."""
    policy = contents.policy
    with policy.topology.megatron_calls(), _quiet():
        loaded: Any = dist_checkpointing.load(shards(contents, loading=True), path)
        for index, module in enumerate(policy.modules):
            module.load_state_dict(loaded[_key(index)])
        if contents.optimizer is not None:
            contents.optimizer.load_state(loaded["optimizer"], loaded["scheduler"])
    if contents.lagged is not None:
        for mean, value in zip(
            contents.lagged.weights, _in_order(policy, loaded["lagged"]), strict=True
        ):
            mean.copy_(value)
    if contents.random:
        found: State = {key: value[0].clone() for key, value in loaded["random"].items()}
        restore_random_state(found, policy.topology.device)
    if contents.scaling:
        own = policy.delayed_scaling()
        values = loaded["scaling"].split([kept.numel() for kept in own])
        for kept, value in zip(own, values, strict=True):
            kept.copy_(value.view_as(kept))


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about its own calls of itself
        yield


def _key(chunk: int) -> str:
    return f"model{chunk}"


# --------------------------------------------------------------------------- the running mean


def _mean_shards(policy: Policy, lagged: LaggedMean, metadata: dict[str, Any]) -> dict[str, Any]:
    """Name the model's own shards anew, over the mean's tensors and its dtype."""
    means = {
        id(shard.parameter): mean for shard, mean in zip(policy.shards, lagged.weights, strict=True)
    }
    found: dict[str, Any] = {}
    for index, module in enumerate(policy.modules):
        parameters = dict(module.named_parameters())
        for name, entry in module.sharded_state_dict(metadata=metadata).items():
            if name not in parameters or not isinstance(
                entry, ShardedTensor | ShardedTensorFactory
            ):
                continue  # what a module keeps beside its weights has no mean
            entry.key = f"lagged.{entry.key}"
            entry.data = means[id(parameters[name])]
            if isinstance(entry, ShardedTensor):
                entry.dtype = entry.data.dtype
            found[f"{index}.{name}"] = entry
    return found


def _in_order(policy: Policy, loaded: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return loaded means in the order of the policy's shards."""
    by_parameter = {
        id(parameter): loaded[f"{index}.{name}"]
        for index, module in enumerate(policy.modules)
        for name, parameter in module.named_parameters()
        if f"{index}.{name}" in loaded
    }
    return [by_parameter[id(shard.parameter)] for shard in policy.shards]


# --------------------------------------------------------------------------- of a rank


def _random_shards(policy: Policy) -> dict[str, Any]:
    """Build a table for each generator, one row a rank."""
    topology = policy.topology
    return {
        key: ShardedTensor.from_rank_offsets(
            _RANDOM + key, value[None], (0, topology.rank, topology.world_size)
        )
        for key, value in random_state(topology.device).items()
    }


def _scaling_shard(policy: Policy) -> ShardedTensor:
    """Build one tensor a rank: stages may have unlike numbers of layers."""
    flat = torch.cat([found.flatten() for found in policy.delayed_scaling()])
    return ShardedTensor.from_rank_offsets(f"{_SCALING}{policy.topology.rank}", flat)
