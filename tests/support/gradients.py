"""Jobs for the worker pool: gradients of a tiny model in some layout, by Hugging Face name."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch

from proma_megatron.batching.packing import loss_tokens, pack
from proma_megatron.config import ModelConfig, ParallelConfig, ProjectionConfig
from proma_megatron.policy.losses import LossOptions
from proma_megatron.policy.model import build_policy
from proma_megatron.policy.parameters import fill, gather, tensor_shapes
from proma_megatron.policy.schedule import forward_backward
from proma_megatron.projection.accumulator import Accumulator
from proma_megatron.records import TrainingSequence
from proma_megatron.topology import layout

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


def batch_denominator(batch: Batch) -> float:
    """N: the loss tokens of all microbatches."""
    return float(loss_tokens([sequence for microbatch in batch for sequence in microbatch]))


def nothing(device: torch.device) -> None:
    """A job that only starts the workers and makes them import what the others need."""


def gradients(
    device: torch.device,
    model: ModelConfig,
    parallel: ParallelConfig,
    projection: ProjectionConfig,
    batch: Batch,
    seed: int = 7,
    algorithm: str = "proma",
    denominator: float | None = None,
) -> dict[str, torch.Tensor]:
    """The accumulated gradient of every Hugging Face tensor (on rank 0; empty elsewhere).

    ``denominator`` is N, if ``batch`` is a part of the minibatch.
    """
    with layout(parallel, device, seed) as topology:
        policy = build_policy(model, VOCAB, 64, topology, seed=seed)
        fill(policy.shards, random_weights(model, seed).__getitem__)
        denominator = batch_denominator(batch) if denominator is None else denominator
        multiple = topology.tensor.size if topology.sequence_parallel else 1
        mine = batch[topology.data.rank :: topology.data.size]
        if topology.virtual_pipeline > 1:  # the interleaved schedule takes multiples of its stages
            mine = [*mine, *([[]] * (-len(mine) % topology.pipeline.size))]
        microbatches = [
            pack(sequences, index, denominator, device, multiple)
            for index, sequences in enumerate(mine)
        ]
        accumulator = None
        if algorithm == "proma" and projection.rule != "none":
            accumulator = Accumulator(
                policy.modules, policy.shards, projection, topology, tied=model.tie_embeddings
            )
        kind = "unit" if accumulator is not None else "reinforce"
        forward_backward(policy, microbatches, LossOptions(kind), accumulator=accumulator)
        return gather(
            policy.shards,
            lambda shard: shard.parameter.main_grad,  # type: ignore[attr-defined]
            model,
            VOCAB,
            topology,
        )
