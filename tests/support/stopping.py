"""What ranks agree on when some of them are asked to stop, and how long their groups wait."""

from __future__ import annotations

import torch
import torch.distributed as dist

from proma_megatron.config.model import ParallelConfig
from proma_megatron.distributed.topology import layout
from proma_megatron.processes.stopping import StopAgreement, StopSignals


def agreement(
    device: torch.device, parallel: ParallelConfig, asked: int | None, late: int | None
) -> list[str | None]:
    """Answers of this rank: within the replica, of all, and of all once nobody asks any more.

    Args:
        asked: rank that got a SIGTERM.
        late: rank by whose clock the time is up.
    """
    signals = StopSignals()
    with layout(parallel, device, seed=0) as topology:
        if topology.rank == asked:
            signals.reason = "SIGTERM"
        now = 61.0 if topology.rank == late else 0.0
        stops = StopAgreement(topology, signals, max_minutes=1, started=0.0, clock=lambda: now)
        answers = [stops.agreed_within_replica(), stops.agreed()]
        signals.reason = None
        now = 0.0
        return [*answers, stops.agreed_within_replica(), stops.agreed()]


def waiting_seconds(device: torch.device, parallel: ParallelConfig, minutes: float) -> set[float]:
    """Time-outs of all groups that the layout makes."""
    world = dist.distributed_c10d._world
    before = set(world.pg_map)
    with layout(parallel, device, seed=0, timeout_minutes=minutes):
        groups = set(world.pg_map) - before
        backends = [group._get_backend(device) for group in groups]
        return {backend.options._timeout.total_seconds() for backend in backends}
