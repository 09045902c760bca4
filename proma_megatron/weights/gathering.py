"""Unsharded tensors from the shards of all ranks, by Hugging Face name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from proma_megatron.config.model import ModelConfig
from proma_megatron.distributed.topology import Topology
from proma_megatron.weights.mapping import tensor_shapes
from proma_megatron.weights.shards import ParameterShard, Reduction

Read = Callable[[ParameterShard], torch.Tensor]


def gather(
    shards: Iterable[ParameterShard],
    read: Read,
    model: ModelConfig,
    vocab_size: int,
    topology: Topology,
) -> dict[str, torch.Tensor]:
    """Gather all of `gather_each` at once: everything on global rank 0, nothing elsewhere."""
    return dict(gather_each(shards, read, model, vocab_size, topology))


def gather_each(
    shards: Iterable[ParameterShard],
    read: Read,
    model: ModelConfig,
    vocab_size: int,
    topology: Topology,
    names: Iterable[str] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield unsharded tensors by Hugging Face name, one by one, on the CPU of global rank 0.

    The other ranks get none, and have to walk to the end all the same: they send their parts
    meanwhile. Only those of the first data-parallel replica have any.

    Args:
        read: the local value of a shard: the parameter, its gradient, or an optimizer state of its
            shape.
        names: which tensors, in which order; None: all.
    """
    holders: dict[str, ParameterShard] = {}
    if topology.data.rank == 0:
        for shard in shards:
            # What every tensor rank holds whole is the first one's to give.
            if shard.reduction is Reduction.DISJOINT or topology.tensor.rank == 0:
                for tensor in shard.tensors:
                    if any(run.tensor == tensor and run.length for run in shard.runs):
                        holders[tensor] = shard
    mine = {name: _Part.of(shard, name, read(shard).dtype) for name, shard in holders.items()}
    parts: list[Any] | None = [None] * topology.world_size if topology.is_main else None
    dist.gather_object(mine, parts, dst=0)
    shapes = tensor_shapes(model, vocab_size)
    for name in shapes if names is None else names:
        local = _entries(holders[name], name, read) if name in holders else None
        if not topology.is_main:
            if local is not None:
                dist.send(local.contiguous(), dst=0)
            continue
        full = torch.empty(0)
        for rank, found in enumerate(parts or ()):
            if name not in found:
                continue
            part: _Part = found[name]
            if rank == topology.rank:
                assert local is not None
                entries = local
            else:
                entries = torch.empty(
                    part.shape(shapes[name]), dtype=part.dtype, device=topology.device
                )
                dist.recv(entries, src=rank)
            if not full.numel():
                full = torch.full(shapes[name], torch.nan, dtype=part.dtype)
            at = 0
            for start, length in part.runs:
                full.narrow(part.axis, start, length).copy_(entries.narrow(part.axis, at, length))
                at += length
        yield name, full


@dataclass(frozen=True)
class _Part:
    """What one rank holds of a tensor."""

    axis: int
    runs: tuple[tuple[int, int], ...]  # (start, length) along the axis
    dtype: torch.dtype

    @classmethod
    def of(cls, shard: ParameterShard, tensor: str, dtype: torch.dtype) -> _Part:
        runs = tuple((r.start, r.length) for r in shard.runs if r.tensor == tensor and r.length)
        return cls(shard.axis, runs, dtype)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        length = sum(length for _, length in self.runs)
        return (*whole[: self.axis], length, *whole[self.axis + 1 :])


def _entries(shard: ParameterShard, tensor: str, read: Read) -> torch.Tensor:
    """Return this rank's entries of a tensor, its runs side by side."""
    value = read(shard).detach()
    return torch.cat(
        [
            value.narrow(shard.axis, run.local, run.length)
            for run in shard.runs
            if run.tensor == tensor and run.length
        ],
        dim=shard.axis,
    )
