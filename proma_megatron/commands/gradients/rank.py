"""One rank of `proma grads` or `proma verify`."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import save_file

from proma_megatron.batching.batch_file import read_batch
from proma_megatron.commands.gradients.job import GradientJob
from proma_megatron.distributed.topology import Topology
from proma_megatron.files import atomic_write
from proma_megatron.learner.gradients import Batch, denominator, projected_gradients
from proma_megatron.model.build import build_policy
from proma_megatron.model.policy import DTYPES, Policy
from proma_megatron.projection import diagnostics
from proma_megatron.projection.diagnostics import UnitSums
from proma_megatron.projection.units import layer_of
from proma_megatron.weights.filling import fill
from proma_megatron.weights.huggingface import read_model

logger = logging.getLogger(__name__)

JOB = GradientJob


def run(job: GradientJob, topology: Topology) -> str | None:
    """Accumulate and project on this rank; rank 0 writes the gradients.

    Returns:
        On rank 0 what was run and its diagnostics, as JSON.
    """
    start = time.monotonic()

    def progress(text: str) -> None:
        if topology.is_main:
            logger.info("[%6.1f s] %s", time.monotonic() - start, text)

    batch = read_batch(job.batch, job.vocab_size)
    policy = _policy(job, batch, topology)
    progress("weights are in place")
    gradients, units = projected_gradients(
        policy, batch, job.config.projection, chains=job.chains, progress=progress
    )
    summary = None
    if topology.is_main:
        dtype = DTYPES[job.config.model.dtype]
        gradients = {name: value.to(dtype).contiguous() for name, value in gradients.items()}
        _write(job, gradients)
        progress(f"wrote {job.out}")
        bad = [name for name, value in gradients.items() if not bool(value.isfinite().all())]
        if bad:
            progress(f"{len(bad)} of {len(gradients)} gradients are not finite, such as {bad[0]}")
        summary = json.dumps(_summary(job, units, batch, bad), allow_nan=False)
    topology.barrier()
    return summary


def _policy(job: GradientJob, batch: Batch, topology: Topology) -> Policy:
    longest = max(len(sequence.tokens) for microbatch in batch for sequence in microbatch)
    seed = job.config.seed if job.weights is None else None
    policy = build_policy(job.model, job.vocab_size, longest, topology, seed=seed)
    if job.weights is not None:
        fill(policy.shards, read_model(job.weights, job.config.model).read)
    return policy


def _write(job: GradientJob, gradients: Mapping[str, torch.Tensor]) -> None:
    config = job.config.model_dump(mode="json")
    with atomic_write(job.out) as part:
        metadata = {"format": "pt", "proma": json.dumps(config)}
        save_file(dict(gradients), part, metadata=metadata)


def _summary(
    job: GradientJob, units: Mapping[str, UnitSums], batch: Batch, bad: Sequence[str]
) -> dict[str, Any]:
    return {
        "out": str(job.out),
        "microbatches": len(batch),
        "sequences": sum(len(microbatch) for microbatch in batch),
        "loss_tokens": int(denominator(batch)),
        "not_finite": list(bad),  # gradients, by name; they are written as they are
        "total": _finite(diagnostics.total(units)),
        "kinds": {kind: _finite(sums) for kind, sums in diagnostics.by_kind(units).items()},
        "units": {name: _finite(units[name]) for name in sorted(units, key=_place)},
    }


def _finite(sums: UnitSums) -> dict[str, float | None]:
    """Return the figures; what overflowed is null, for JSON has no other word."""
    return {k: v if math.isfinite(v) else None for k, v in sums.figures().items()}


def _place(name: str) -> tuple[bool, int, str]:
    """Return a key that puts layers in their order, then embedding, final norm and head."""
    layer = layer_of(name)
    return layer is None, layer or 0, name
