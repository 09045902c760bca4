"""Jobs for the worker pool: write a checkpoint in one layout, read it in another."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

from proma_megatron.batching.packing import pack
from proma_megatron.checkpoints import saving
from proma_megatron.checkpoints.compatibility import layout_of, optimizer_of, shape_of
from proma_megatron.checkpoints.loading import load_checkpoint
from proma_megatron.checkpoints.random_state import seed_generators
from proma_megatron.checkpoints.saving import Retention, Saver, SaveReport
from proma_megatron.checkpoints.sharded import Contents
from proma_megatron.config.model import ModelConfig, ParallelConfig
from proma_megatron.config.trainer import OptimizerConfig
from proma_megatron.distributed.topology import Topology, layout
from proma_megatron.errors import ConfigError, StorageError
from proma_megatron.learner.optimizer import Optimizer
from proma_megatron.learner.schedule import forward_backward
from proma_megatron.learner.snapshots import WeightSnapshot
from proma_megatron.losses.options import REINFORCE
from proma_megatron.model.build import build_policy
from proma_megatron.model.policy import Policy
from proma_megatron.runs.checkpoint_folder import Marker, checkpoints, is_complete
from proma_megatron.weights.gathering import gather
from support.gradients import TINY, VOCAB, random_batch

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


def save(path: Path, policy: Policy, optimizer: Optimizer | None) -> None:
    """A complete checkpoint, as a run leaves it after step 2."""
    topology = policy.topology
    contents = Contents(policy, optimizer, random=True)
    marker = _marker(policy, contents, 2)
    Saver(topology, path.parent, Retention(), background=False).save(path.name, contents, marker)


def _step(policy: Policy, optimizer: Optimizer, seed: int) -> None:
    """One plain optimizer step on a random batch that is alike in every layout."""
    topology = policy.topology
    batch = random_batch(seed, [2, 2, 2, 2])
    mine = batch[topology.data.rank :: topology.data.size]
    multiple = policy.token_multiple
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
        save(path, policy, optimizer)
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
        state = load_checkpoint(path, Contents(policy, optimizer)).state
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


def write_alone(device: torch.device, path: Path) -> None:
    """A checkpoint of `TINY`'s weights, in tensor parallel over all ranks."""
    with layout(_tensor_parallel(), device, seed=0) as topology:
        save(path, build_policy(TINY, VOCAB, 64, topology, seed=1), None)


def read_alone(device: torch.device, path: Path, **shape: int) -> tuple[str, bool]:
    """What is wrong with it, and whether this rank's weights are still those before."""
    with layout(_tensor_parallel(), device, seed=0) as topology:
        model = TINY.model_copy(update=shape)
        policy = build_policy(model, VOCAB, 64, topology, seed=2)
        before = [shard.parameter.detach().clone() for shard in policy.shards]
        complaint = ""
        try:
            load_checkpoint(path, Contents(policy))
        except (ConfigError, StorageError) as error:
            complaint = str(error)
        same = all(
            torch.equal(shard.parameter, value)
            for shard, value in zip(policy.shards, before, strict=True)
        )
        return complaint, same


def _tensor_parallel() -> ParallelConfig:
    return ParallelConfig(tensor=torch.distributed.get_world_size())


# --------------------------------------------------------------------------- beside training


def _marker(policy: Policy, contents: Contents, step: int, score: float | None = None) -> Marker:
    config = contents.optimizer.config if contents.optimizer else OptimizerConfig()
    return Marker(
        phase="rl",
        step=step,
        state={"step": step},
        model=shape_of(policy.model, policy.vocab_size),
        layout=layout_of(policy.topology),
        optimizer=optimizer_of(policy.model, config),
        holds=contents.names,
        score=score,
    )


def save_and_train_on(device: torch.device, folder: Path) -> tuple[bool, bool, bool]:
    """Save in the background, held up until the weights have changed, and read it back.

    Whether it was complete before its files were, whether they were still to be written when
    training went on, and whether weights and the next step are those of the checkpoint.
    """
    with layout(_tensor_parallel(), device, seed=0) as topology:
        policy, optimizer = _build(TINY, topology, OptimizerConfig(lr=1e-2), seed=1)
        _step(policy, optimizer, seed=10)
        saver = Saver(topology, folder, Retention(), background=True)
        then = _weights(policy)
        contents = Contents(policy, optimizer)
        with _held_up() as go_on:
            saver.save("step_000002", contents, _marker(policy, contents, 2))
            busy = saver.busy
            _step(policy, optimizer, seed=11)
            complete_early = is_complete(folder / "step_000002")
            go_on()
            saver.finish()
        after = _weights(policy)
        load_checkpoint(folder / "step_000002", contents)
        intact = _equal(_weights(policy), then)
        _step(policy, optimizer, seed=11)
        return complete_early, busy, intact and _equal(_weights(policy), after)


def _equal(found: Weights, expected: Weights) -> bool:
    return all(torch.equal(found[name], value) for name, value in expected.items())


@contextmanager
def _held_up() -> Iterator[Callable[[], None]]:
    """The writing of files waits to be let go."""
    free = threading.Event()
    write = saving._write

    def wait_and_write(*arguments: Any) -> None:
        free.wait(60)
        write(*arguments)

    with mock.patch.object(saving, "_write", wait_and_write):
        yield free.set


def save_many(device: torch.device, folder: Path, scores: list[float | None]) -> list[list[str]]:
    """Save a checkpoint for each score, keeping the last and the best; complete ones in between."""
    with layout(ParallelConfig(), device, seed=0) as topology:
        policy = build_policy(TINY, VOCAB, 64, topology, seed=1)
        saver = Saver(topology, folder, Retention(keep_last=1, keep_best=1), background=True)
        contents, seen = Contents(policy), []
        for step, score in enumerate(scores):
            seen.append(_complete_ones(folder))
            saver.save(f"step_{step:06d}", contents, _marker(policy, contents, step, score))
            saver.finish()
        return [*seen, _complete_ones(folder)]


def _complete_ones(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder) if is_complete(path)]


def save_and_fail(device: torch.device, folder: Path, failing: int) -> str:
    """A first checkpoint, then one that a rank has no room for; what this rank says of it."""
    with layout(_tensor_parallel(), device, seed=0) as topology:
        policy = build_policy(TINY, VOCAB, 64, topology, seed=1)
        saver = Saver(topology, folder, Retention(), background=True)
        contents = Contents(policy)
        saver.save("step_000001", contents, _marker(policy, contents, 1))
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = filesystem_async._write_item
        try:
            saver.finish()
            if topology.rank == failing:
                filesystem_async._write_item = mock.Mock(side_effect=full)
            saver.save("step_000002", contents, _marker(policy, contents, 2))
            saver.finish()
        except StorageError as error:
            return str(error)
        finally:
            filesystem_async._write_item = written
        return ""


def save_without_links(device: torch.device, folder: Path) -> str:
    """Two checkpoints of which one is to stay, the second where no links can be made."""
    said: list[SaveReport] = []
    with layout(ParallelConfig(), device, seed=0) as topology:
        policy = build_policy(TINY, VOCAB, 64, topology, seed=1)
        retention = Retention(keep_last=1)
        saver = Saver(topology, folder, retention, background=False, saved=said.append)
        contents = Contents(policy)
        saver.save("step_000001", contents, _marker(policy, contents, 1))
        no_links = OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        with mock.patch.object(saving, "point", mock.Mock(side_effect=no_links)):
            saver.save("step_000002", contents, _marker(policy, contents, 2))
    return str(said[-1])


def step_after_loading_weights(device: torch.device, path: Path) -> float:
    """How far a step moves weights that were loaded after the optimizer was built."""
    model = TINY.model_copy(update={"dtype": "bfloat16"})
    with layout(ParallelConfig(), device, seed=0) as topology:
        save(path, build_policy(model, VOCAB, 64, topology, seed=1), None)
        policy, optimizer = _build(model, topology, OptimizerConfig(lr=1e-3), seed=2)
        load_checkpoint(path, Contents(policy, optimizer))
        loaded = {name: value.clone() for name, value in _weights(policy).items()}
        _step(policy, optimizer, seed=10)
        after = _weights(policy)
        return max(float((after[name] - value).abs().max()) for name, value in loaded.items())


def draws(device: torch.device, path: Path) -> tuple[list[float], list[float]]:
    """Draw after a checkpoint, and again once it has been read back."""
    with layout(_tensor_parallel(), device, seed=0) as topology:
        policy, _ = _build(TINY, topology, OptimizerConfig(), seed=1)
        seed_generators(3, topology.rank)
        random.gauss()  # keeps a second number for the next call
        save(path, policy, None)
        first = _draw()
        load_checkpoint(path, Contents(policy, random=True))
        return first, _draw()


def _draw() -> list[float]:
    return [random.gauss(), random.random(), np.random.random(), float(torch.rand(()))]
