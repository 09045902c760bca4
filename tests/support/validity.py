"""Linear weights with two pairs of operands, and jobs for the worker pool that compare them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import torch

from proma_megatron.batching.packing import pack
from proma_megatron.config.model import ParallelConfig
from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.distributed.topology import Axis, Topology, layout
from proma_megatron.projection.factors.contraction import Rows
from proma_megatron.projection.factors.workspace import Workspace
from proma_megatron.projection.fp8_gate import FP8Gate, GateFigures, Pair
from proma_megatron.projection.units import Unit
from proma_megatron.projection.updaters.registry import make_updater
from proma_megatron.types import Microbatch, TrainingSequence
from proma_megatron.weights.shards import ParameterShard, Reduction

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Weight:
    """A linear weight, or a tensor rank's part of it, at one microbatch."""

    units: dict[str, Rows]
    operands: Pair
    fp8: Pair
    accumulated: torch.Tensor  # A (out, in) before the microbatch
    axis: int = 0  # that tensor ranks cut
    reduction: Reduction = Reduction.DISJOINT

    def part(self, rank: int, size: int) -> Weight:
        """Of a tensor rank, equal in size for all; nothing is left of units that lie elsewhere."""
        if self.reduction is Reduction.REPLICATED:
            return self
        length = self.accumulated.shape[self.axis] // size
        low, high = rank * length, (rank + 1) * length

        def cut(operands: Pair) -> Pair:
            x, dy = operands
            return (x, dy[:, low:high]) if self.axis == 0 else (x[:, low:high], dy)

        units = self.units
        if self.axis == 0:
            units = {
                name: tuple(
                    (max(start, low) - low, min(stop, high) - low)
                    for start, stop in rows
                    if max(start, low) < min(stop, high)
                )
                for name, rows in units.items()
            }
        accumulated = self.accumulated.narrow(self.axis, low, length).contiguous()
        return replace(
            self,
            units=units,
            operands=cut(self.operands),
            fp8=cut(self.fp8),
            accumulated=accumulated,
        )

    def shard_units(self, projected: bool = True) -> tuple[Unit, ...]:
        shard = ParameterShard(
            name="+".join(self.units),
            parameter=torch.nn.Parameter(self.accumulated),
            axis=self.axis,
            runs=(),
            reduction=self.reduction,
            layer=0,
            linear=True,
        )
        return tuple(Unit(name, shard, rows, projected) for name, rows in self.units.items())


@dataclass(frozen=True)
class Case:
    """What one replica looks at."""

    weights: tuple[Weight, ...]
    lengths: tuple[int, ...]
    advantages: torch.Tensor  # (k,)

    def microbatch(self, index: int = 0) -> Microbatch:
        return packed(self.lengths, index, self.advantages.tolist())

    def gradients(self, operands: Pair, rows: Rows) -> torch.Tensor:
        """G (d, k) of a unit, whole."""
        x, dy = operands
        wanted = [row for start, stop in rows for row in range(start, stop)]
        offsets = self.microbatch().sequences.offsets
        found = [dy[low:high].T @ x[low:high] for low, high in pairwise(offsets)]
        return torch.stack([gradient[wanted].flatten() for gradient in found], dim=1)


def packed(lengths: Sequence[int], index: int, advantages: Sequence[float]) -> Microbatch:
    """With padding at the end: T is a multiple of 8, and more than the sequences' tokens."""
    sequences = [
        TrainingSequence((0,) * length, (1,) * length, advantage, (0.0,) * length)
        for length, advantage in zip(lengths, advantages, strict=True)
    ]
    return pack(sequences, index, 1.0, CPU, 8 * (sum(lengths) // 8 + 1))


def alone() -> Topology:
    """One process, without process groups."""
    axis = Axis(group=cast(Any, None), size=1, rank=0)
    return Topology(
        device=CPU,
        rank=0,
        world_size=1,
        tensor=axis,
        pipeline=axis,
        data=axis,
        model=axis,
        virtual_pipeline=1,
        sequence_parallel=False,
        tied_ends=None,
    )


def looked(
    case: Case,
    config: ProjectionConfig,
    topology: Topology,
    *,
    workspace: Workspace | None = None,
    dtype: torch.dtype = torch.float64,
) -> GateFigures | None:
    """A gate's figures of this rank's part of ``case``: its stage's weights, its tensor rank's."""
    gate = FP8Gate(config, make_updater(config, topology.tensor, dtype).solve)
    microbatch = case.microbatch()
    gate.arm([microbatch])
    assert gate.wants(microbatch)
    weights = case.weights[topology.pipeline.rank :: topology.pipeline.size]
    for weight in weights if topology.tensor.rank == 0 else weights[::-1]:
        mine = weight.part(topology.tensor.rank, topology.tensor.size)
        gate.look(
            microbatch,
            mine.shard_units(),
            mine.operands,
            mine.fp8,
            mine.accumulated,
            workspace or Workspace(2**20, CPU),
        )
    return gate.figures(topology)


def looked_together(
    device: torch.device, cases: list[Case], config: ProjectionConfig, parallel: ParallelConfig
) -> GateFigures | None:
    """A replica each for the cases; what this rank is told."""
    with layout(parallel, device, seed=0) as topology:
        return looked(cases[topology.data.rank], config, topology)
