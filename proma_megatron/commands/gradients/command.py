"""`proma grads`: check everything that is read, start the ranks, print what they found."""

from __future__ import annotations

import os
from pathlib import Path

from proma_megatron.batching.batch_file import read_batch, write_batch
from proma_megatron.commands.gradients.job import GradientJob
from proma_megatron.config.run import GradientsConfig, check_layout
from proma_megatron.files import check_output
from proma_megatron.processes.ranks import (
    already_started,
    as_started,
    job_folder,
    run_job,
    say,
    take_part,
)
from proma_megatron.processes.slurm import adopt_slurm
from proma_megatron.weights.huggingface import read_model


def grads(weights: Path, batch: Path, out: Path, config: GradientsConfig) -> None:
    """Write the accumulated gradient of every parameter; the last line of stdout is JSON.

    Raises:
        ConfigError: the model, the batch, the layout or the output file don't fit.
        WorkerError: a rank failed.
    """
    adopt_slurm(os.environ)
    found = read_model(weights, config.model)
    config = as_started(config)
    check_layout(found.model, config.parallel)
    sequences = read_batch(batch, found.vocab_size)
    check_output(out, [batch, *weights.iterdir()])
    projection = config.projection
    if (
        projection.active
        and not projection.acts_alone
        and len(sequences) <= (config.parallel.data or 1)
    ):
        say("nothing is projected: no replica has a second microbatch")
    job = GradientJob(
        config=config,
        model=found.model,
        vocab_size=found.vocab_size,
        weights=weights,
        batch=batch,
        out=out,
    )
    if already_started():
        take_part(job, _run_gradients)
        return
    with job_folder("grads") as folder:
        # The ranks read what was checked here, also if the batch came through a pipe.
        write_batch(folder / "batch.jsonl", sequences)
        job = job.model_copy(update={"batch": folder / "batch.jsonl"})
        print(run_gradients_job(job, folder), flush=True)


def run_gradients_job(job: GradientJob, folder: Path) -> str:
    """The summary of a job on ranks of this machine; raises as `jobs.run_job`."""
    return run_job("proma_megatron.commands.gradients.rank", job, job.config, folder, "gradients")


def _run_gradients(job: GradientJob, logs: Path | None) -> str | None:
    from proma_megatron.commands.gradients.rank import run_gradients  # loads Megatron

    return run_gradients(job, logs)
