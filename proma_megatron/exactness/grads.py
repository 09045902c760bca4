"""`proma grads`: check everything that is read, start the ranks, print what they found."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from proma_megatron.batching.batch_file import read_batch
from proma_megatron.config import GradientsConfig, ParallelConfig, check_layout
from proma_megatron.exactness.job import GradientJob, check_output, working_folder
from proma_megatron.placement import check_world_size, choose_device
from proma_megatron.policy.huggingface import read_model
from proma_megatron.slurm import adopt_slurm
from proma_megatron.workers import start_workers


def grads(weights: Path, batch: Path, out: Path, config: GradientsConfig) -> None:
    """Write the accumulated gradient of every parameter; the last line of stdout is JSON.

    Raises:
        ConfigError: the model, the batch, the layout or the output file don't fit.
        WorkerError: a rank failed.
    """
    adopt_slurm(os.environ)
    found = read_model(weights, config.model)
    check_layout(found.model, config.parallel)
    sequences = read_batch(batch, found.vocab_size)
    check_output(out)
    replicas = config.parallel.data or 1
    if config.projection.active and len(sequences) <= replicas:
        _say("nothing is projected: no replica has a second microbatch")
    with working_folder("grads") as folder:
        job = GradientJob(
            config=config,
            model=found.model,
            vocab_size=found.vocab_size,
            weights=weights,
            batch=batch,
            out=out,
            summary=folder / "summary.json",
        )
        if "RANK" in os.environ:
            _take_part(job, folder)
        else:
            run_job(job, folder)
            print(job.summary.read_text(), flush=True)


def run_job(job: GradientJob, folder: Path) -> None:
    """Start the ranks of a job on this machine and wait for them.

    ``folder`` takes the job and what the ranks print.

    Raises:
        ConfigError: there are too few GPUs for the layout.
        WorkerError: a rank failed.
    """
    parallel = job.config.parallel
    device = choose_device(job.config.device, parallel.world_size)
    _say(f"{describe(parallel)}: {workers_on(parallel.world_size, device)}")
    path = folder / "job.json"
    path.write_text(job.model_dump_json())
    start_workers(
        "proma_megatron.exactness.worker",
        [str(path), str(folder)],
        count=parallel.world_size,
        name="grads",
        logs=folder,
        process=job.config.trainer,
    )


def describe(parallel: ParallelConfig) -> str:
    """A layout in words."""
    if parallel.world_size == 1:
        return "one process"
    parts = [f"tensor {parallel.tensor}", f"pipeline {parallel.pipeline}"]
    if parallel.virtual_pipeline:
        parts.append(f"virtual {parallel.virtual_pipeline}")
    parts.append(f"data {parallel.data or 1}")
    return " x ".join(parts) + (", sequence parallel" if parallel.sequence else "")


def workers_on(count: int, device: str) -> str:
    backend = "NCCL" if device == "cuda" else "Gloo"
    return f"{count} worker{'s' if count > 1 else ''} on {device} ({backend})"


def _take_part(job: GradientJob, folder: Path) -> None:
    """One rank among those that torchrun or srun started."""
    check_world_size(job.config.parallel, int(os.environ["WORLD_SIZE"]))
    from proma_megatron.exactness.worker import run_gradients

    stdout = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    run_gradients(job, folder)
    if os.environ["RANK"] == "0":
        os.write(stdout, job.summary.read_bytes() + b"\n")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
