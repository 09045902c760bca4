"""Ranks and process groups of this run.

One `Topology` is built after the workers start and passed along; this is the only module that
touches Megatron's ``parallel_state``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from proma_megatron.config.model import ParallelConfig
from proma_megatron.distributed import cpu
from proma_megatron.distributed.devices import check_world_size
from proma_megatron.errors import StorageError


@dataclass(frozen=True)
class Axis:
    """One dimension of the layout: its process group and this rank's place in it."""

    group: dist.ProcessGroup
    size: int
    rank: int

    def global_rank(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)


@dataclass(frozen=True)
class Topology:
    """Where this process stands in the layout."""

    device: torch.device
    rank: int
    world_size: int
    tensor: Axis
    pipeline: Axis
    data: Axis
    model: Axis  # tensor x pipeline: one copy of the policy
    virtual_pipeline: int  # model chunks on this stage, 1 without interleaving
    sequence_parallel: bool
    # First and last stage, over Gloo; None on stages between them, and without pipeline.
    tied_ends: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline.rank == self.pipeline.size - 1

    @property
    def last_stage(self) -> int:
        """Global rank of the last stage with this rank's tensor and data coordinates."""
        return self.pipeline.global_rank(self.pipeline.size - 1)

    def megatron_calls(self) -> contextlib.AbstractContextManager[None]:
        return cpu.megatron_calls(self.device)

    def from_last_stage(self, value: Any) -> Any:
        """Broadcast a picklable object of the last stage to all stages of this replica."""
        if self.pipeline.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(
            box, src=self.last_stage, group=self.pipeline.group, device=self.device
        )
        return box[0]

    def from_model_rank_0(self, value: Any) -> Any:
        """Broadcast a picklable object from the first rank of this replica to the others."""
        if self.model.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(
            box, src=self.model.global_rank(0), group=self.model.group, device=self.device
        )
        return box[0]

    def from_rank_0[Value](self, values: list[Value]) -> list[Value]:
        """Broadcast picklable objects from the first rank of all to the others."""
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0, device=self.device)
        return values

    def gather_over_data(self, value: Any) -> list[Any]:
        """Gather one picklable object from every replica, in replica order, on every rank."""
        if self.data.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.data.size
        dist.all_gather_object(gathered, value, group=self.data.group)
        return gathered

    def gather_over_all(self, value: Any) -> list[Any]:
        """Gather one picklable object from every rank, by rank, on every rank."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def gather_over_stages(self, value: Any) -> list[Any]:
        """Gather one picklable object from every pipeline stage of this replica, on every rank."""
        if self.pipeline.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.pipeline.size
        dist.all_gather_object(gathered, value, group=self.pipeline.group)
        return gathered

    def least(self, value: int, axis: Axis | None = None) -> int:
        """Return the smallest of the ranks' integers, on one axis of the layout or of all ranks."""
        if (self.world_size if axis is None else axis.size) == 1:
            return value
        box = torch.tensor([value], device=self.device)
        dist.all_reduce(box, dist.ReduceOp.MIN, group=None if axis is None else axis.group)
        return int(box)

    def agree(self, action: Callable[[], None]) -> None:
        """Do something on every rank, and fail on all of them if the disk failed on one.

        Raises:
            StorageError: that of the lowest rank that had one.
        """
        problem = None
        try:
            action()
        except StorageError as error:
            problem = str(error)
        first = next((text for text in self.gather_over_all(problem) if text is not None), None)
        if first is not None:
            raise StorageError(first)

    def barrier(self) -> None:
        dist.barrier()


@contextlib.contextmanager
def process_group(device_type: str, timeout_minutes: float) -> Iterator[torch.device]:
    """Join the default process group from torchrun's environment; leave it at the end."""
    device = setup_device(device_type)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(minutes=timeout_minutes),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()


def setup_device(device_type: str) -> torch.device:
    """Set up and return this worker's device; on a CPU, Megatron's CUDA calls are redirected."""
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        # NVIDIA's containers allow TF32, whose 10 bits would be all that K and c have.
        torch.set_float32_matmul_precision("highest")
        return device
    cpu.install()
    return torch.device("cpu")


@contextlib.contextmanager
def layout(
    parallel: ParallelConfig, device: torch.device, seed: int, timeout_minutes: float = 10.0
) -> Iterator[Topology]:
    """Cut the default process group into a layout; give the groups back at the end.

    Raises:
        ConfigError: the number of processes is not tensor x pipeline x data.
    """
    world = dist.get_world_size()
    check_world_size(parallel, world)
    with cpu.megatron_calls(device):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
            # Typed as whole minutes, but Megatron only makes a timedelta of them.
            distributed_timeout_minutes=cast(int, timeout_minutes),
            create_gloo_process_groups=device.type == "cuda",
        )
        model_parallel_cuda_manual_seed(seed)
    topology = None
    try:
        topology = _read_topology(parallel, device, timeout_minutes)
        yield topology
    finally:
        if topology is not None and topology.tied_ends is not None:
            dist.destroy_process_group(topology.tied_ends)
        parallel_state.destroy_model_parallel()


def _axis(group: Any) -> Axis:
    return Axis(group=group, size=dist.get_world_size(group), rank=dist.get_rank(group))


def _tied_ends(parallel: ParallelConfig, timeout_minutes: float) -> dist.ProcessGroup | None:
    """Make the pair of this rank, if it is on the first or the last stage.

    Over Gloo also on GPUs: an NCCL send runs on the device until it is received, and with
    CUDA_DEVICE_MAX_CONNECTIONS=1 a second one that waits behind it would hold up the very pipeline
    that the receiver waits for.
    """
    if parallel.pipeline == 1:
        return None
    pipeline: Any = parallel_state.get_pipeline_model_parallel_group()
    stages = dist.get_process_group_ranks(pipeline)
    pairs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pairs, (stages[0], stages[-1]))
    mine: Any = None
    for pair in sorted(set(pairs)):  # every rank takes part in making every group
        group = dist.new_group(
            list(pair), backend="gloo", timeout=timedelta(minutes=timeout_minutes)
        )
        if dist.get_rank() in pair:
            mine = group
    return mine


def _read_topology(
    parallel: ParallelConfig, device: torch.device, timeout_minutes: float
) -> Topology:
    return Topology(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor=_axis(parallel_state.get_tensor_model_parallel_group()),
        pipeline=_axis(parallel_state.get_pipeline_model_parallel_group()),
        data=_axis(parallel_state.get_data_parallel_group()),
        model=_axis(parallel_state.get_model_parallel_group()),
        virtual_pipeline=parallel.virtual_pipeline or 1,
        sequence_parallel=parallel.sequence,
        tied_ends=_tied_ends(parallel, timeout_minutes),
    )
