"""Changes of the configuration that lower the memory of the fullest rank, found by re-planning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from proma_megatron.config.run import TRAINING, RunConfig

SHOWN = 6
LEAST = 0.01  # of the fullest rank's memory: what saves less is not worth a line


@dataclass(frozen=True)
class Knob:
    """One change and what it would do."""

    change: str  # as an override on the command line
    saves: int  # bytes on the fullest rank
    fits: bool  # whether it is enough by itself
    more_gpus: bool  # whether it takes more GPUs than the plan has


def find_knobs(
    config: RunConfig,
    needed: Callable[[RunConfig], int],
    now: int,
    gpu_memory: int,
    gpus_per_node: int,
) -> tuple[Knob, ...]:
    """Find the changes that are valid and help, the largest saving first.

    Args:
        needed: bytes on the fullest rank under another configuration.
        now: the same under ``config``.
    """
    found = []
    for key, value in _candidates(config, gpus_per_node):
        changed = with_override(config, key, value)
        if changed is None:
            continue
        saves = now - needed(changed)
        if saves > LEAST * now:
            text = f"{key}={str(value).lower() if isinstance(value, bool) else value}"
            more = changed.parallel.world_size > config.parallel.world_size
            found.append(Knob(text, saves, now - saves <= gpu_memory, more))
    found.sort(key=lambda knob: (-knob.saves, knob.more_gpus))
    return tuple(found[:SHOWN])


def with_override(config: RunConfig, key: str, value: Any) -> RunConfig | None:
    """Return ``config`` with one key of a section changed, or None where that is no valid one."""
    section, name = key.split(".")
    changed = config.model_dump()
    changed[section][name] = value
    try:
        return RunConfig.model_validate(changed, context=TRAINING)
    except ValidationError:
        return None


def _candidates(config: RunConfig, gpus_per_node: int) -> Iterator[tuple[str, Any]]:
    """Yield changes worth a try; validation and re-planning sort out the rest."""
    parallel, batching = config.parallel, config.batching
    if 2 * parallel.tensor <= gpus_per_node:  # its messages are too many for a network
        yield "parallel.tensor", 2 * parallel.tensor
    yield "parallel.pipeline", 2 * parallel.pipeline
    if not parallel.sequence:
        yield "parallel.sequence", True
    yield "parallel.data", 2 * (parallel.data or 1)
    if not config.optimizer.distributed:
        yield "optimizer.distributed", True
    if config.model.recompute == "none":
        yield "model.recompute", "full"
    if config.model.dtype == "float32":
        yield "model.dtype", "bfloat16"
    if batching.sequences_per_microbatch is not None:
        yield "batching.sequences_per_microbatch", batching.sequences_per_microbatch // 2
    else:
        smaller = max(config.max_sequence_length, batching.tokens_per_microbatch // 2)
        yield "batching.tokens_per_microbatch", smaller
    yield "rollout.batch_size", config.rollout.batch_size // 2
    yield "projection.workspace_mb", config.projection.workspace_mb // 2
