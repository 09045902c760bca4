"""`proma grads`: check everything that is read, start the ranks, print what they found."""

from __future__ import annotations

from pathlib import Path

from proma_megatron.batching.batch_file import read_batch, write_batch
from proma_megatron.commands.gradients.job import GradientJob
from proma_megatron.config.run import GradientsConfig, check_layout
from proma_megatron.files import check_output
from proma_megatron.processes.ranks import as_started, run_on_ranks, say
from proma_megatron.weights.huggingface import read_model

RANK = "proma_megatron.commands.gradients.rank"  # also of `proma verify`


def grads(weights: Path, batch: Path, out: Path, config: GradientsConfig) -> None:
    """Write the accumulated gradient of every parameter; the last line of stdout is JSON.

    Raises:
        ConfigError: the model, the batch, the layout or the output file don't fit.
        WorkerError: a rank failed.
    """
    config = as_started(config)
    found = read_model(weights, config.model)
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

    def copied(job: GradientJob, folder: Path) -> GradientJob:
        # The ranks read what was checked here, also if the batch came through a pipe.
        write_batch(folder / "batch.jsonl", sequences)
        return job.model_copy(update={"batch": folder / "batch.jsonl"})

    summary = run_on_ranks(RANK, job, purpose="grads", stage=copied)
    if summary is not None:
        print(summary, flush=True)
