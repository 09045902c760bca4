"""Fill a rank's shards, from weights that are read or at random."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

import torch

from proma_megatron.config.model import ModelConfig

if TYPE_CHECKING:
    from proma_megatron.distributed.topology import Topology
from proma_megatron.weights.mapping import parameter_shards, tensor_shapes
from proma_megatron.weights.shards import ParameterShard


class Narrowable(Protocol):
    """A tensor, or what reads slices of one from a file."""

    def narrow(self, axis: int, start: int, length: int, /) -> torch.Tensor: ...


def fill(shards: Iterable[ParameterShard], read: Callable[[str], Narrowable]) -> None:
    """Copy slices of Hugging Face tensors into local parameters; padding rows become 0.

    ``read(name)`` gives one tensor; it is called for one tensor at a time, and only for those of
    which this rank holds a part.
    """
    with torch.no_grad():
        for shard in shards:
            if sum(run.length for run in shard.runs) < shard.parameter.shape[shard.axis]:
                shard.parameter.zero_()  # vocabulary padding
            for tensor in shard.tensors:
                if not any(run.tensor == tensor and run.length for run in shard.runs):
                    continue
                value = read(tensor)
                for run in shard.runs:
                    if run.tensor == tensor and run.length:
                        source = value.narrow(shard.axis, run.start, run.length)
                        shard.parameter.narrow(shard.axis, run.local, run.length).copy_(source)


def initialize(
    chunk: torch.nn.Module, model: ModelConfig, vocab_size: int, topology: Topology, seed: int
) -> None:
    """Draw weights by (seed, Hugging Face name) alone, and so alike in every layout.

    Normal with ``init_std``, scaled by 1/sqrt(2 * layers) for the two projections that write into
    the residual stream, as GPT-2 does; norms 1, biases 0.
    """
    shapes = tensor_shapes(model, vocab_size)

    def read(name: str) -> torch.Tensor:
        shape = shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        if name.endswith(".bias"):
            return torch.zeros(shape)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = model.init_std / (2 * model.layers) ** 0.5 if residual else model.init_std
        return torch.randn(shape, generator=generator) * std

    fill(parameter_shards(chunk, model, vocab_size, topology), read)
