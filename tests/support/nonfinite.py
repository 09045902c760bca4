"""Jobs for the worker pool: updates some of which are not finite, and what they leave behind."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from proma_megatron.batching.batch_file import read_batch
from proma_megatron.config.model import ModelConfig, ParallelConfig
from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.distributed.topology import Topology, layout
from proma_megatron.learner import minibatch
from proma_megatron.learner.gradients import projected_gradients
from proma_megatron.learner.learner import Learner
from proma_megatron.learner.nonfinite import NonFiniteEvent, dump
from proma_megatron.learner.optimizer import Optimizer
from proma_megatron.model.build import build_policy
from proma_megatron.model.policy import Policy
from proma_megatron.projection.accumulator import Accumulator
from proma_megatron.types import TrainingSequence
from support.gradients import VOCAB
from support.learning import SEED, Tensors, gathered, learning

Minibatch = list[TrainingSequence]


@dataclass(frozen=True)
class Case:
    """Updates of fresh weights: first a good one, so that Adam has a state."""

    tree: dict[str, Any]
    first: Minibatch
    then: list[Minibatch]
    distributed: bool = False
    still: bool = False  # without moving the weights: the gradient is that of the seed's
    supervised: bool = False  # as in the warm start, of one minibatch


@dataclass(frozen=True)
class Left:
    """What `Case.then` has left behind."""

    metrics: dict[str, float]
    offences: list[NonFiniteEvent]
    unchanged: bool  # weights, Adam's state and schedule, on this rank
    weights: Tensors  # on rank 0
    passes: int  # through the schedule
    norms: int  # of gradient buffers
    empty: bool  # no gradient is left in the buffers


def updates(
    device: torch.device, model: ModelConfig, parallel: ParallelConfig, cases: Sequence[Case]
) -> list[Left]:
    """Each case from the same weights."""
    with layout(parallel, device, SEED) as topology:
        return [_update(model, topology, parallel, case) for case in cases]


def _update(model: ModelConfig, topology: Topology, parallel: ParallelConfig, case: Case) -> Left:
    learner, optimizer = _build(model, topology, parallel, case)

    def update(minibatches: list[Minibatch]) -> dict[str, float]:
        if case.supervised:
            return learner.supervise(minibatches[0], optimizer)
        batching = learner.config.batching.model_copy(update={"minibatches": len(minibatches)})
        learner.config = learner.config.model_copy(update={"batching": batching})
        return learner.update(minibatches, optimizer, 0.0)

    assert update([case.first])["optimizer/skipped"] == 0
    assert learner.offences == []
    before = _state(optimizer)
    with _counted() as counts:
        metrics = update(case.then)
    buffers = [b.grad_data for chunk in learner.policy.chunks for b in chunk.buffers]
    return Left(
        metrics,
        learner.offences,
        _same(before, _state(optimizer)),
        gathered(learner.policy, "weight"),
        counts["forward_backward"],
        counts["gradient_fits"],
        not any(bool(buffer.any()) for buffer in buffers),
    )


def _build(
    model: ModelConfig, topology: Topology, parallel: ParallelConfig, case: Case
) -> tuple[Learner, Optimizer]:
    tree = {
        "optimizer": {"lr": 1e-30 if case.still else 0.01, "distributed": case.distributed},
        **case.tree,
    }
    config = learning(model, parallel, tree)
    policy = build_policy(
        model, VOCAB, 64, topology, seed=SEED, distributed_optimizer=case.distributed
    )
    accumulator = None
    if config.projects:
        accumulator = Accumulator.of(policy, config.projection)
    return Learner(config, policy, accumulator), Optimizer(policy, config.optimizer, 10)


@contextmanager
def _counted() -> Iterator[dict[str, int]]:
    """Calls of what an update costs."""
    counts = {"forward_backward": 0, "gradient_fits": 0}
    before = {name: getattr(minibatch, name) for name in counts}

    def counting(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return before[name](*arguments, **options)

        return call

    for name in counts:
        setattr(minibatch, name, counting(name))
    try:
        yield counts
    finally:
        for name, function in before.items():
            setattr(minibatch, name, function)


def _state(optimizer: Optimizer) -> list[Any]:
    """Copies of everything that an update changes on this rank."""
    whole = optimizer.optimizer
    found: list[Any] = [optimizer.scheduler.state_dict()]
    found += [[p.detach().clone() for p in c.parameters()] for c in optimizer.policy.chunks]
    for part in getattr(whole, "chained_optimizers", [whole]):
        for group in part.optimizer.param_groups:
            found.append({key: value for key, value in group.items() if key != "params"})
            for parameter in group["params"]:
                found.append(parameter.detach().clone())
                state = part.optimizer.state[parameter]
                assert state, "Adam has a state after the first update"
                found.append({key: _copy(value) for key, value in state.items()})
    return found


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _same(left: Any, right: Any) -> bool:
    """Bit by bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return left == right


# --------------------------------------------------------------------------- dumps


def replayed(
    device: torch.device, model: ModelConfig, offences: Sequence[NonFiniteEvent], projection: Any
) -> list[tuple[list[int], bool]]:
    """Each offence dumped, read and accumulated by one process at the seed's weights.

    Returns:
        Sequences of its microbatches, and whether its gradient and figures are finite.
    """
    found = []
    with layout(ParallelConfig(), device, SEED) as topology, tempfile.TemporaryDirectory() as tmp:
        policy = build_policy(model, VOCAB, 64, topology, seed=SEED)
        for offence in offences:
            path = Path(tmp) / "deeper" / "dump.jsonl"
            dump(offence, path)
            batch = read_batch(path, VOCAB)
            assert list(path.parent.iterdir()) == [path]
            found.append(([len(m) for m in batch], _finite(policy, batch, projection)))
    return found


def _finite(policy: Policy, batch: list[Minibatch], projection: ProjectionConfig) -> bool:
    gradients, units = projected_gradients(policy, batch, projection)
    squares = [float(gradient.square().sum()) for gradient in gradients.values()]
    figures = [value for sums in units.values() for value in sums.figures().values()]
    return all(map(math.isfinite, (*squares, *figures)))


def gradient_norm(device: torch.device, model: ModelConfig, sequence: TrainingSequence) -> float:
    """|gradient| of REINFORCE on this sequence, over its loss tokens."""
    with layout(ParallelConfig(), device, SEED) as topology:
        policy = build_policy(model, VOCAB, 64, topology, seed=SEED)
        gradients, _ = projected_gradients(policy, [[sequence]], ProjectionConfig(rule="none"))
        return sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
