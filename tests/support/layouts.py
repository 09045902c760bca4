"""Jobs for the worker pool: what a rank knows of its layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from proma_megatron.config.model import ParallelConfig
from proma_megatron.distributed.topology import layout
from proma_megatron.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """Coordinates of one rank, and what it got from its collectives."""

    tensor: int
    pipeline: int
    data: int
    is_main: bool
    is_first_stage: bool
    is_last_stage: bool
    last_stage: int
    at_an_end: bool
    from_last_stage: str
    gathered: list[int]


def places(device: torch.device, layouts: list[ParallelConfig]) -> list[Place]:
    """This rank's place in each layout, one layout after the other in one process group."""
    found = []
    for parallel in layouts:
        with layout(parallel, device, seed=0) as topology:
            found.append(
                Place(
                    topology.tensor.rank,
                    topology.pipeline.rank,
                    topology.data.rank,
                    topology.is_main,
                    topology.is_first_stage,
                    topology.is_last_stage,
                    topology.last_stage,
                    topology.tied_ends is not None,
                    topology.from_last_stage(f"rank {topology.rank}"),
                    topology.gather_over_data(topology.rank),
                )
            )
    return found


def refusal(device: torch.device, parallel: ParallelConfig) -> str:
    """What `layout` says to a layout that this process group can't hold."""
    dist.barrier()  # a rank that left at once would cut off others that still connect
    try:
        with layout(parallel, device, seed=0):
            return "accepted"
    except ConfigError as error:
        return str(error)
