"""One rank of `proma export`: weights of a checkpoint to safetensors, a tensor at a time.

Started through `startup`, or entered directly under torchrun and srun.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from proma_megatron.checkpoints.loading import load_policy
from proma_megatron.commands.export.job import ExportJob
from proma_megatron.distributed.topology import Topology
from proma_megatron.processes.ranks import on_layout, serve
from proma_megatron.weights.gathering import gather_each
from proma_megatron.weights.mapping import tensor_shapes
from proma_megatron.weights.writing import _plan, _write


def run_export(job: ExportJob, logs: Path | None) -> str | None:
    """The job of this rank, from torchrun's environment variables; rank 0 writes the files.

    Args:
        logs: where a rank that fails says so; None: on standard error only.

    Returns:
        On rank 0 what was written, as JSON.
    """
    return on_layout(job.config, logs, partial(_run, job))


def _run(job: ExportJob, topology: Topology) -> str | None:
    policy = load_policy(job.config, job.vocab_size, job.checkpoint, topology)
    dtype: torch.dtype = getattr(torch, job.dtype)
    shapes = tensor_shapes(policy.model, job.vocab_size)
    files = _plan(shapes, dtype, job.shard_size)
    order = [name for names in files.values() for name in names]
    tensors = gather_each(
        policy.shards,
        lambda shard: shard.parameter,
        policy.model,
        job.vocab_size,
        topology,
        names=order,
    )
    if not topology.is_main:
        for _ in tensors:
            pass
        return None
    try:
        return json.dumps(_write(job.out, tensors, files, dtype))
    except BaseException:
        shutil.rmtree(job.out)  # the process ends at once; nobody else would
        raise


def main(arguments: Sequence[str]) -> None:
    serve(arguments, ExportJob, run_export)
