"""Checkpoints of the policy through Megatron's dist_checkpointing.

A checkpoint is a folder ``step_000050`` that any layout can read. It is complete once it holds
``complete.json``, written last, after every rank has finished.
"""

from __future__ import annotations

import json
import queue
import warnings
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from proma_megatron.config import ConfigError, RunConfig
from proma_megatron.policy.huggingface import read_model
from proma_megatron.policy.model import Policy, build_policy
from proma_megatron.policy.optimizer import Optimizer
from proma_megatron.policy.parameters import fill
from proma_megatron.run_dir import MARKER
from proma_megatron.topology import Topology


def save_checkpoint(
    path: Path, policy: Policy, optimizer: Optimizer | None, state: dict[str, Any]
) -> None:
    """Write weights, the optimizer if given, and a small JSON-like ``state``; on all ranks."""
    topology = policy.topology
    if topology.is_main:
        path.mkdir(parents=True, exist_ok=True)
        (path / MARKER).unlink(missing_ok=True)
    topology.barrier()
    # Saves are synchronous, so the writer's results need no queue between processes. Megatron would
    # start a manager process for it, which imports this program once more: 10 s of a core per rank.
    filesystem_async._results_queue = queue.Queue()  # type: ignore[assignment]
    with topology.megatron_calls():
        dist_checkpointing.save(_sharded(policy, optimizer, loading=False), str(path))
    topology.barrier()
    if topology.is_main:
        temporary = path / (MARKER + ".tmp")
        temporary.write_text(json.dumps(state))
        temporary.replace(path / MARKER)
    topology.barrier()


def load_checkpoint(path: Path, policy: Policy, optimizer: Optimizer | None) -> dict[str, Any]:
    """Read weights, and the optimizer if given, into this layout; the state that was saved.

    Without ``optimizer``, build optimizers after this call: in bfloat16 they copy the weights.

    Raises:
        ConfigError: the folder is no complete checkpoint.
    """
    marker = path / MARKER
    if not marker.is_file():
        raise ConfigError(
            f"{path} is no complete checkpoint: it has no {MARKER}; choose another one"
        )
    with policy.topology.megatron_calls(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about its own calls of itself
        sharded = _sharded(policy, optimizer, loading=True)
        loaded: Any = dist_checkpointing.load(sharded, str(path))
        for index, module in enumerate(policy.modules):
            module.load_state_dict(loaded[_key(index)])
        if optimizer is not None:
            optimizer.load_state(loaded["optimizer"], loaded["scheduler"])
    return json.loads(marker.read_text())


def load_policy(
    config: RunConfig, vocab_size: int, checkpoint: Path | None, topology: Topology
) -> Policy:
    """A policy for sampling and reading: weights of a checkpoint, or of ``config.model.path``.

    Raises:
        ConfigError: the checkpoint or the directory is not complete.
    """
    policy = build_policy(
        config.model,
        config.model.vocab_size or vocab_size,
        config.max_sequence_length,
        topology,
        seed=None,
        frozen=True,
    )
    if checkpoint is not None:
        load_checkpoint(checkpoint, policy, None)
    else:
        load_pretrained(config, policy)
    return policy


def load_pretrained(config: RunConfig, policy: Policy) -> None:
    """Fill the policy with the weights of ``config.model.path``.

    Each rank reads its own slices, one tensor at a time.
    """
    assert config.model.path is not None
    found = read_model(config.model.path, config.model, compare_head=False)
    fill(policy.shards, found.read)


def _key(chunk: int) -> str:
    return f"model{chunk}"


def _sharded(policy: Policy, optimizer: Optimizer | None, *, loading: bool) -> dict[str, Any]:
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
    if optimizer is not None:
        everything = model if len(model) > 1 else model[_key(0)]
        state["optimizer"] = optimizer.optimizer.sharded_state_dict(
            everything, is_loading=loading, metadata=metadata
        )
        state["scheduler"] = optimizer.scheduler.state_dict()
    return state
