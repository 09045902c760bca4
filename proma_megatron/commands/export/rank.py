"""One rank of `proma export`: weights of a checkpoint to safetensors, a tensor at a time."""

from __future__ import annotations

import json
import shutil

import torch

from proma_megatron.checkpoints.loading import load_policy
from proma_megatron.commands.export.job import ExportJob
from proma_megatron.distributed.topology import Topology
from proma_megatron.weights.gathering import gather_each
from proma_megatron.weights.mapping import tensor_shapes
from proma_megatron.weights.writing import _plan, _write

JOB = ExportJob


def run(job: ExportJob, topology: Topology) -> str | None:
    """Gather the weights on this rank; rank 0 writes the files.

    Returns:
        On rank 0 what was written, as JSON.
    """
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
