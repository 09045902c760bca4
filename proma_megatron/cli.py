"""The `proma` command: the list of commands, each of which imports its own when it is called."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from proma_megatron.config.constants import EXIT_STOPPED
from proma_megatron.errors import ConfigError, RunError, RunStopped, WorkerError
from proma_megatron.launching.cli import app as launch
from proma_megatron.processes import logs

app = typer.Typer(
    help="PROMA: proximal policy updates by projected microbatch accumulation, on Megatron-Core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.add_typer(launch, name="launch")


logger = logging.getLogger("proma_megatron.cli")  # also where this file is ``__main__``


@app.callback()
def _root(
    quiet: Annotated[bool, typer.Option("--quiet", help="Show results and errors only.")] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            help="Show also what processes do; of a run, keep it in logs/rank<r>.log, too.",
        ),
    ] = False,
) -> None:
    if quiet and verbose:
        raise ConfigError("--quiet can't be combined with --verbose; choose one")
    if quiet or verbose:
        logs.configure("ERROR" if quiet else "DEBUG")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes such as trainer.steps=10.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run from its newest checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the run that the directory holds.")
    ] = False,
    resume_or_start: Annotated[
        bool,
        typer.Option(
            "--resume-or-start",
            help="Resume if there is a complete checkpoint, else start anew; for jobs that are "
            "queued again with the same command.",
        ),
    ] = False,
) -> None:
    """Train a policy. Starts one worker per rank of the layout, unless under torchrun or srun.

    SIGTERM, SIGUSR1, Ctrl-C and trainer.max_minutes save and stop the run; a second Ctrl-C ends it.
    Exit codes: 0 done; 1 failed; 2 the configuration doesn't fit; 75 stopped early with everything
    saved, to go on with --resume.
    """
    if resume_or_start and (resume or overwrite):
        other = "--resume" if resume else "--overwrite"
        raise ConfigError(f"--resume-or-start can't be combined with {other}; choose one")
    from proma_megatron.config.loading import load_config

    checked = load_config(config, overrides or [])
    if resume_or_start:
        from proma_megatron.runs.directory import resumes

        resume = resumes(checked.run_dir)
        overwrite = not resume
    from proma_megatron.commands.train.command import (
        train as run,  # imports torch and Megatron: seconds
    )

    run(checked, resume=resume, overwrite=overwrite)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes such as parallel.tensor=8.")
    ] = None,
    gpu_memory: Annotated[
        float, typer.Option(min=0.001, help="GiB of one GPU that the run may use.")
    ] = 76.0,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of one node.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what a run needs before it is started: memory, microbatches, traffic. Exits with 1 if
    it does not fit."""
    from proma_megatron.commands.plan import plan as run

    fits = run(
        config,
        overrides or [],
        gpu_memory=gpu_memory,
        gpus_per_node=gpus_per_node,
        as_json=as_json,
    )
    if not fits:
        sys.exit(1)


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file of a run; default: any in bfloat16.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes such as device=cuda.")
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks of the run on this node; default: all.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Try what this machine has (GPUs, NCCL, torch, Megatron-Core, Transformer Engine, Apex,
    NeMo-Run), say what a run would use and what is wrong. Exits with 1 if something is."""
    from proma_megatron.commands.doctor.command import doctor as run

    if not run(config, overrides or [], gpus_per_node, as_json=as_json):
        sys.exit(1)


@app.command()
def grads(
    hf: Annotated[Path, typer.Option(help="Hugging Face directory of a dense Qwen model.")],
    batch: Annotated[
        Path, typer.Option(help="JSONL, one sequence a line; see docs/reference/files.md.")
    ],
    out: Annotated[Path, typer.Option(help="safetensors file to write.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes such as parallel.tensor=2.")
    ] = None,
) -> None:
    """Write the projected gradient of every parameter, unsharded. No optimizer step is made."""
    from proma_megatron.config.loading import gradients_config

    config = gradients_config(overrides or [])
    from proma_megatron.commands.gradients.command import (
        grads as run,  # imports torch: a second
    )

    run(hf, batch, out, config)


@app.command()
def verify(
    source: Annotated[
        Path, typer.Argument(help="YAML file of a run, or Hugging Face directory of a Qwen model.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes such as parallel.tensor=2.")
    ] = None,
) -> None:
    """Compare projected gradients of a layout with those of one process, parameter by parameter."""
    from proma_megatron.commands.verify.command import verify as run

    if not run(source, overrides or []):
        sys.exit(1)


@app.command("eval")
def evaluate(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT_OR_HF",
            help="A run, one of its checkpoints, or a Hugging Face directory of a Qwen model.",
        ),
    ],
    data: Annotated[Path, typer.Option(help="JSONL or parquet file of problems.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes such as parallel.data=8.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Completions of a problem; 1 is greedy.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file whose prompts, reward and layout a Hugging Face model takes."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSONL file of all completions.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the JSONL file that is there.")
    ] = False,
) -> None:
    """Measure a policy on a file of problems: accuracy, pass@k, lengths, every completion."""
    from proma_megatron.commands.evaluate.command import evaluate_saved
    from proma_megatron.runs.policies import open_policy

    chosen = [f"evaluation.samples={samples}"] if samples is not None else []
    saved = open_policy(source, [*chosen, *(overrides or [])], config)
    evaluate_saved(saved, data, out, overwrite=overwrite)


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run, or one of its checkpoints.")
    ],
    out: Annotated[Path, typer.Option(help="Directory to make.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes such as parallel.tensor=1.")
    ] = None,
    dtype: Annotated[
        Literal["float64", "float32", "float16", "bfloat16"] | None,
        typer.Option(help="Of the weights; default: that of the run."),
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Largest weights file.")] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an export that is there.")
    ] = False,
) -> None:
    """Write a policy as a Hugging Face directory, for transformers and vLLM."""
    from proma_megatron.commands.export.command import export as run
    from proma_megatron.runs.policies import open_policy

    run(open_policy(source, overrides or []), out, dtype, shard_size, overwrite=overwrite)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories; those that differ in the seed are one.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="PNG to write, with CSV and HTML beside it; default RUN/report.png."),
    ] = None,
) -> None:
    """Draw accuracy, KL, entropy, reward and removed energy of finished or running runs."""
    from proma_megatron.commands.report import report as run

    run(runs, out, _typed())


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(help="YAML file of the runs.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes such as optimizer.lr=1e-4.")
    ] = None,
    algorithms: Annotated[
        str, typer.Option(help="Names, with commas between them.")
    ] = "proma,reinforce,grpo",
    seeds: Annotated[int, typer.Option(help="How many, from the configuration's on.")] = 3,
    steps: Annotated[int | None, typer.Option(help="RL steps of each run.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew instead of continuing.")
    ] = False,
) -> None:
    """Train by several algorithms and seeds, from one policy on the same prompts, and draw them
    together. Started again, it continues."""
    from proma_megatron.commands.compare.command import compare as run
    from proma_megatron.commands.compare.runs import read_comparison

    comparison = read_comparison(config, overrides or [], algorithms, seeds, steps)
    run(comparison, overwrite=overwrite, command=_typed())


def _typed() -> str:
    """Return the command as a shell would take it."""
    return shlex.join(["proma", *sys.argv[1:]])


def main() -> None:
    """Run the command line. Config errors are one sentence and exit code 2, failures are 1."""
    try:
        logs.configure()
        app(standalone_mode=True)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":  # under torchrun every rank finds the same fault
            logger.error("error: %s", error)
        sys.exit(2)
    except Exception as error:
        if isinstance(error, RunStopped):
            if os.environ.get("RANK", "0") == "0":
                logger.error("%s", error)
            sys.exit(EXIT_STOPPED)
        if not isinstance(error, WorkerError | RunError):
            raise
        logger.error("error: %s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
