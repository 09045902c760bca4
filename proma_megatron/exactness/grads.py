"""`proma grads`: check everything that is read, start the ranks, print what they found."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from proma_megatron.batching.batch_file import read_batch, write_batch
from proma_megatron.config import GradientsConfig, ParallelConfig, check_layout
from proma_megatron.exactness.job import SUMMARY, GradientJob, check_output, working_folder
from proma_megatron.placement import check_world_size, choose_device
from proma_megatron.policy.huggingface import read_model
from proma_megatron.slurm import adopt_slurm
from proma_megatron.startup import defer_compilation
from proma_megatron.workers import start_workers


def grads(weights: Path, batch: Path, out: Path, config: GradientsConfig) -> None:
    """Write the accumulated gradient of every parameter; the last line of stdout is JSON.

    Raises:
        ConfigError: the model, the batch, the layout or the output file don't fit.
        WorkerError: a rank failed.
    """
    adopt_slurm(os.environ)
    found = read_model(weights, config.model)
    if "RANK" in os.environ:  # torchrun or srun started the processes
        config = _with_replicas(config, int(os.environ["WORLD_SIZE"]))
    check_layout(found.model, config.parallel)
    sequences = read_batch(batch, found.vocab_size)
    check_output(out, [batch, *weights.iterdir()])
    if config.projection.active and len(sequences) <= (config.parallel.data or 1):
        _say("nothing is projected: no replica has a second microbatch")
    job = GradientJob(
        config=config,
        model=found.model,
        vocab_size=found.vocab_size,
        weights=weights,
        batch=batch,
        out=out,
    )
    if "RANK" in os.environ:
        _take_part(job)
        return
    with working_folder("grads") as folder:
        # The ranks read what was checked here, also if the batch came through a pipe.
        write_batch(folder / "batch.jsonl", sequences)
        print(run_job(job.model_copy(update={"batch": folder / "batch.jsonl"}), folder), flush=True)


def run_job(job: GradientJob, folder: Path) -> str:
    """Start the ranks of a job on this machine and wait for them.

    ``folder`` takes the job and what the ranks print.

    Returns:
        The summary that rank 0 wrote, JSON.

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
        name="gradients",
        logs=folder,
        process=job.config.trainer,
    )
    return (folder / SUMMARY).read_text()


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


def _with_replicas(config: GradientsConfig, world: int) -> GradientsConfig:
    """The number of replicas that so many processes make; ConfigError if they don't fit."""
    check_world_size(config.parallel, world)
    parallel = {"data": world // config.parallel.model_size}
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})


def _take_part(job: GradientJob) -> None:
    """One rank among those that torchrun or srun started."""
    stdout = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # also what imports print
    defer_compilation()
    from proma_megatron.exactness.worker import run_gradients

    summary = run_gradients(job, logs=None)
    if summary is not None:
        os.write(stdout, summary.encode() + b"\n")


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
