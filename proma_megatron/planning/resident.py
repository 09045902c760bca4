"""Memory that a rank holds all the time: weights, main gradients and the optimizer, exactly.

Without ``optimizer.distributed``, every parameter has its own storage and the gradient buffer is
their sum. With it, Megatron lays weights and gradients out alike in padded buffers and each replica
owns an equal part of every bucket (megatron/core/optimizer: param_layout.py, distrib_optimizer.py).
There is one bucket a chunk, and one for a table that two stages share.

Left out: Adam's step counters (4 bytes a parameter) and what an allocator adds by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from proma_megatron.planning.shapes import Local, Precision, Stage

_START = 64  # entries: parameters start at a multiple
_END = 128  # buckets end at a multiple of this and of the replicas


@dataclass(frozen=True)
class Resident:
    """Bytes on the fullest replica's rank of a stage."""

    weights: int
    main_gradients: int
    optimizer: int
    optimizer_entries: int  # parameters that this rank updates

    @property
    def total(self) -> int:
        return self.weights + self.main_gradients + self.optimizer


def resident(stage: Stage, precision: Precision, replicas: int, *, distributed: bool) -> Resident:
    """Return what a rank of this stage holds, in the replica with the most optimizer state."""
    return max(
        by_replica(stage, precision, replicas, distributed=distributed), key=lambda r: r.total
    )


def by_replica(
    stage: Stage, precision: Precision, replicas: int, *, distributed: bool
) -> list[Resident]:
    """Return the same for every replica."""
    each = 2 * precision.state + precision.master
    if not distributed:
        entries = sum(parameter.count for parameter in stage.parameters)
        return [
            Resident(
                entries * precision.compute, entries * precision.gradient, entries * each, entries
            )
        ] * replicas
    buckets = [bucket for chunk in stage.chunks for bucket in _buckets(chunk, replicas)]
    padded = sum(bucket.length for bucket in buckets)
    owned = [sum(bucket.owned(rank, replicas) for bucket in buckets) for rank in range(replicas)]
    return [
        Resident(padded * precision.compute, padded * precision.gradient, entries * each, entries)
        for entries in owned
    ]


@dataclass(frozen=True)
class _Bucket:
    """A part of a buffer that is reduced at once; ranges are half-open, in entries."""

    length: int  # with padding
    ranges: tuple[tuple[int, int], ...]  # of the parameters

    def owned(self, rank: int, replicas: int) -> int:
        """Return entries of parameters in this replica's part."""
        part = self.length // replicas
        low, high = rank * part, (rank + 1) * part
        return sum(max(0, min(high, stop) - max(low, start)) for start, stop in self.ranges)


def _buckets(chunk: tuple[Local, ...], replicas: int) -> Iterator[_Bucket]:
    """Yield Megatron's layout: parameters from the last to the first, each at a multiple of 64."""
    multiple = math.lcm(replicas, _END)
    ranges: list[tuple[int, int]] = []
    offset = 0  # of the bucket in its buffer
    at = 0  # in the buffer
    for parameter in reversed(chunk):
        at = _up(at, _START)
        if parameter.shared and ranges:
            # The bucket's end is padded in the buffer's own numbering, which starts at 0.
            end = _up(at, multiple)
            yield _Bucket(end - offset, tuple(ranges))
            ranges, offset, at = [], end, end
        ranges.append((at - offset, at - offset + parameter.count))
        at += parameter.count
        if parameter.shared:
            end = _up(at, multiple)
            yield _Bucket(end - offset, tuple(ranges))
            ranges, offset, at = [], end, end
    if ranges:
        yield _Bucket(_up(at, multiple) - offset, tuple(ranges))


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
