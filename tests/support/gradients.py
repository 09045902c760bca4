"""Jobs for the worker pool: gradients of a tiny model in some layout, by Hugging Face name."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads

from proma_megatron.batching.packing import pack
from proma_megatron.config.model import ModelConfig, ParallelConfig
from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.distributed.topology import layout
from proma_megatron.learner.gradients import denominator, projected_gradients, replica_share
from proma_megatron.learner.schedule import forward_backward
from proma_megatron.losses.options import REINFORCE, UNIT
from proma_megatron.losses.policy_loss import policy_loss
from proma_megatron.model.build import build_policy
from proma_megatron.model.logprobs import vocab_parallel_logprobs
from proma_megatron.model.policy import Policy
from proma_megatron.projection import grouping
from proma_megatron.projection.accumulator import Accumulator
from proma_megatron.projection.capture import Capture
from proma_megatron.projection.updaters import sums
from proma_megatron.types import Microbatch, TrainingSequence
from proma_megatron.weights.filling import fill
from proma_megatron.weights.gathering import gather
from proma_megatron.weights.mapping import tensor_shapes

VOCAB = 251  # prime: never divides before padding
TINY = ModelConfig(
    hidden_size=32,
    ffn_hidden_size=48,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=8,
    init_std=0.2,
    dtype="float64",
)

Batch = list[list[TrainingSequence]]


def random_batch(seed: int, counts: Sequence[int], shortest: int = 4, longest: int = 12) -> Batch:
    """Microbatches of these numbers of sequences, of random lengths, masks and advantages."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    def sequence() -> TrainingSequence:
        length = integer(shortest, longest)
        prompt = integer(1, length - 2)
        return TrainingSequence(
            tokens=tuple(integer(0, VOCAB - 1) for _ in range(length)),
            loss_mask=tuple(int(i >= prompt) for i in range(length)),
            advantage=float(torch.randn((), generator=generator)),
            old_logprobs=(0.0,) * length,
            token_weights=tuple(
                (0.5 + torch.rand(length, generator=generator, dtype=torch.float64)).tolist()
            ),
        )

    return [[sequence() for _ in range(count)] for count in counts]


def random_weights(model: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """float64 values of every Hugging Face tensor, with norms off 1 and biases off 0.

    At their initial values a forgotten norm weight or bias would go unnoticed.
    """
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, shape in tensor_shapes(model, VOCAB).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64) * model.init_std
        values[name] = 1 + noise if name.endswith("norm.weight") else noise
    return values


def streaming(projection: ProjectionConfig, block_bytes: int) -> ProjectionConfig:
    """``projection`` with room for blocks of so few bytes that nothing is materialized.

    A configuration file can't ask for this: its workspace is at least 1 MiB.
    """
    workspace = Fraction(2 * block_bytes, 2**20)
    return projection.model_copy(update={"workspace_mb": workspace})


def nothing(device: torch.device) -> None:
    """A job that only starts the workers and makes them import what the others need."""


@contextlib.contextmanager
def _policy(
    device: torch.device, model: ModelConfig, parallel: ParallelConfig, seed: int = 7
) -> Iterator[Policy]:
    """A policy of random weights, in a layout that lasts as long."""
    with layout(parallel, device, seed) as topology:
        policy = build_policy(model, VOCAB, 64, topology, seed=seed)
        fill(policy.shards, random_weights(model, seed).__getitem__)
        yield policy


def gradients(
    device: torch.device,
    model: ModelConfig,
    parallel: ParallelConfig,
    projection: ProjectionConfig,
    batch: Batch,
    seed: int = 7,
    total: float | None = None,
) -> dict[str, torch.Tensor]:
    """The accumulated gradient of every Hugging Face tensor (on rank 0; empty elsewhere).

    ``total`` is N, if ``batch`` is a part of the minibatch.
    """
    with _policy(device, model, parallel, seed) as policy:
        found, _ = projected_gradients(policy, batch, projection, total=total)
        return found


def captured_gradients(
    device: torch.device,
    model: ModelConfig,
    parallel: ParallelConfig,
    projection: ProjectionConfig,
    batch: Batch,
    padding: int | None = None,
) -> dict[str, torch.Tensor]:
    """As `gradients` on one replica, through the accumulator even where nothing is projected.

    ``padding`` fills microbatches up to a multiple of so many tokens.
    """
    with _policy(device, model, parallel) as policy:
        accumulator = _accumulator(policy, projection)
        total = denominator(batch)
        microbatches = replica_share(batch, 0, 1, policy, total)
        if padding is not None:
            microbatches = [
                pack(sequences, index, total, device, padding)
                for index, sequences in enumerate(batch)
            ]
        forward_backward(policy, microbatches, UNIT, accumulator=accumulator)
        return _main_grads(policy)


def _accumulator(policy: Policy, projection: ProjectionConfig) -> Accumulator:
    return Accumulator.of(policy, projection)


def _main_grads(policy: Policy) -> dict[str, torch.Tensor]:
    return gather(
        policy.shards,
        lambda shard: shard.parameter.main_grad,  # type: ignore[attr-defined]
        policy.model,
        policy.vocab_size,
        policy.topology,
    )


def unit_figures(
    device: torch.device,
    model: ModelConfig,
    parallel: ParallelConfig,
    projection: ProjectionConfig,
    batch: Batch,
    raw: bool = False,
) -> dict[str, Any]:
    """The diagnostics of every unit, or the sums behind them."""
    with _policy(device, model, parallel) as policy:
        _, units = projected_gradients(policy, batch, projection)
        return {name: sums if raw else sums.figures() for name, sums in units.items()}


def plain_gradients(
    device: torch.device,
    model: ModelConfig,
    parallel: ParallelConfig,
    projection: ProjectionConfig,
    batch: Batch,
) -> dict[str, torch.Tensor]:
    """Stock layers and DDP, a backward pass after the other: no schedule and no accumulator."""
    with _policy(device, model, parallel) as policy:
        topology = policy.topology
        (chunk,) = policy.chunks
        with topology.megatron_calls():
            for microbatch in replica_share(batch, 0, 1, policy, denominator(batch)):
                logits = policy.forward_packed(chunk, microbatch)[0]
                logprobs, entropy = vocab_parallel_logprobs(
                    logits, microbatch.labels, VOCAB, topology
                )
                policy_loss(logprobs, entropy, microbatch, REINFORCE).backward()
            finalize_model_grads([chunk], None)
        return _main_grads(policy)


def gradients_without_waiting(
    device: torch.device,
    model: ModelConfig,
    parallel: ParallelConfig,
    projection: ProjectionConfig,
    batch: Batch,
) -> dict[str, torch.Tensor]:
    """As `gradients`, but short vectors are finished with their layer."""
    with mock.patch.object(grouping, "LATE_BYTES", 0):
        return gradients(device, model, parallel, projection, batch)


def gradients_after_a_broken_step(
    device: torch.device,
    model: ModelConfig,
    parallel: ParallelConfig,
    projection: ProjectionConfig,
    batch: Batch,
) -> dict[str, torch.Tensor]:
    """As `captured_gradients`, by an accumulator whose step before ended in an error.

    That step's microbatches are this one's in another order.
    """
    with _policy(device, model, parallel) as policy:
        accumulator = _accumulator(policy, projection)
        total = denominator(batch)
        take, projected = accumulator.updater.take, 0

        def breaking(capture: Capture, microbatch: Microbatch) -> list[Any]:
            nonlocal projected
            projected += not capture.first
            if projected == 13:  # others of its group wait, and vectors of the last layer
                raise ArithmeticError
            return take(capture, microbatch)

        accumulator.updater.take = breaking
        with contextlib.suppress(ArithmeticError):
            earlier = replica_share(batch[::-1], 0, 1, policy, total)
            forward_backward(policy, earlier, UNIT, accumulator=accumulator)
        assert projected == 13
        assert accumulator.groups.waiting
        accumulator.updater.take = take
        microbatches = replica_share(batch, 0, 1, policy, total)
        forward_backward(policy, microbatches, UNIT, accumulator=accumulator)
        return _main_grads(policy)


def collectives(
    device: torch.device,
    model: ModelConfig,
    parallel: ParallelConfig,
    projection: ProjectionConfig,
    batch: Batch,
) -> dict[str, torch.Tensor]:
    """Under "sizes": the numbers of float64 values in each collective of the projection."""
    sizes: list[int] = []
    original = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"] == sums.__name__:
            sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        gradients(device, model, parallel, projection, batch)
    finally:
        dist.all_reduce = original
    return {"sizes": torch.tensor(sizes)}
