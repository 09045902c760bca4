"""One setting, measured on all ranks of its process group."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.cost.hooks import Hooks
from benchmarks.cost.settings import Effort, Setting
from benchmarks.cost.ways import (
    Step,
    batch,
    plain,
    projected_parameters,
    projected_units,
    proma,
)
from benchmarks.live_bytes import LiveBytes
from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.distributed.topology import Topology
from proma_megatron.model.policy import Policy
from proma_megatron.types import Microbatch

RATIOS = (
    ("proma", "plain"),
    ("hooks", "plain"),
    ("hooks_by_layer", "plain"),
    ("hooks", "proma"),
    ("hooks_by_layer", "proma"),
)
# Of untimed steps: after the first microbatch, in which nothing is projected, one that is.
PROBED = 2


class Collectives(TorchDispatchMode):
    """Counts the collectives that this rank takes part in, and the bytes that it gives to them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            self.count += 1
            self.bytes += sum(t.nbytes for t in tree_iter(args) if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Probe:
    """What one way takes and sends, for two microbatches."""

    peak: int  # bytes above what is there between steps
    collectives: int
    sent: int  # bytes given to collectives


def probe(make: Callable[[], Step], microbatches: Sequence[Microbatch]) -> Probe:
    """Run an untimed step and look at it.

    The step is made here, so that what it keeps from step to step counts as well; what it measures
    and agrees on when it is made does not.
    """
    step = make()
    device = microbatches[0].tokens.device
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with Collectives() as sent:
            step(microbatches)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with LiveBytes() as live, Collectives() as sent:
            step(microbatches)
        peak = live.peak
    return Probe(peak, sent.count, sent.bytes)


def timed(step: Step, microbatches: Sequence[Microbatch], topology: Topology) -> float:
    """Seconds from a common start to this rank's end; on a GPU by its own clock."""
    _synchronize(topology)
    topology.barrier()
    if topology.device.type == "cuda":
        _synchronize(topology)  # the barrier is a kernel, too
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        step(microbatches)
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3
    start = time.perf_counter()
    step(microbatches)
    return time.perf_counter() - start


def interleaved(
    steps: Mapping[str, Step],
    microbatches: Sequence[Microbatch],
    effort: Effort,
    topology: Topology,
) -> dict[str, list[float]]:
    """Seconds of the slowest rank in each round; every round runs each way once, in turn first."""
    names = list(steps)
    rounds: list[list[float]] = []
    start = time.perf_counter()
    for first in cycle(range(len(names))):
        seconds = dict.fromkeys(names, 0.0)
        for name in names[first:] + names[:first]:
            seconds[name] = timed(steps[name], microbatches, topology)
        rounds.append(list(seconds.values()))
        # Every rank has to stop after the same round.
        if topology.least(int(effort.enough(len(rounds), time.perf_counter() - start))):
            break
    slowest = [
        [max(found) for found in zip(*ranks, strict=True)]
        for ranks in zip(*topology.gather_over_all(rounds), strict=True)
    ]
    return dict(zip(names, map(list, zip(*slowest, strict=True)), strict=True))


def measure(
    setting: Setting, policy: Policy, reused: Step, effort: Effort, topology: Topology
) -> dict[str, Any]:
    """One row of the results, alike on every rank.

    Args:
        reused: our way, with the accumulator that earlier settings of this model had.
    """
    config, microbatches = ProjectionConfig(), batch(setting, topology)
    few, hooks = microbatches[:PROBED], Hooks(policy)
    made: dict[str, Callable[[], Step]] = {
        "plain": lambda: plain(policy),
        "proma": lambda: proma(policy, config),
        "hooks": lambda: Hooks(policy).step,
        "hooks_by_layer": lambda: Hooks(policy, by_layer=True).step,
    }
    steps: dict[str, Step] = {
        "plain": plain(policy),
        "proma": reused,
        "hooks": hooks.step,
        "hooks_by_layer": Hooks(policy, by_layer=True).step,
    }
    steps = {way: step for way, step in steps.items() if way in effort.ways}
    probed = {way: make for way, make in made.items() if way in effort.ways}
    # Also the warm-up, except for what the reused accumulator keeps.
    probes = {way: probe(make, few) for way, make in probed.items()}
    reused(few)
    seconds = interleaved(steps, microbatches, effort, topology)
    units = {"proma": projected_units(policy, config), "hooks": hooks.units}
    return {
        **setting.model_dump(),
        "threads": torch.get_num_threads(),
        "projected_parameters": projected_parameters(policy, config),
        "rounds": len(seconds["plain"]),
        "seconds": {way: statistics.median(found) for way, found in seconds.items()},
        "ratios": {
            f"{above}/{below}": spread(
                [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
            )
            for above, below in RATIOS
            if above in seconds and below in seconds
        },
        "peak_bytes": {
            way: max(topology.gather_over_all(found.peak)) for way, found in probes.items()
        },
        "collectives": {
            way: _added(probes[way], probes["plain"], count, setting.sequences)
            for way, count in units.items()
            if way in probes
        },
        "rounds_seconds": seconds,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return dict.fromkeys(("median", "low", "high"), values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def _added(found: Probe, plain: Probe, units: int, k: int) -> dict[str, float]:
    """What one projected microbatch sends more than plain accumulation."""
    sent = found.sent - plain.sent
    return {
        "count": found.collectives - plain.collectives,
        "bytes": sent,
        "units": units,
        "bytes_per_unit": sent / units,
        "scalars_per_unit": 8 * (k + k**2),  # bytes of K and c in float64
    }


def _synchronize(topology: Topology) -> None:
    if topology.device.type == "cuda":
        torch.cuda.synchronize(topology.device)
