"""The `proma` command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from proma_megatron.config import ConfigError
from proma_megatron.config_file import gradients_config, load_config

app = typer.Typer(
    help="PROMA: proximal policy updates by projected microbatch accumulation, on Megatron-Core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Keep `train` a subcommand of its own."""


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
) -> None:
    """Train a policy. Starts one worker per rank of the layout, unless under torchrun or srun."""
    checked = load_config(config, overrides or [])
    from proma_megatron.launcher import train as launch  # imports torch and Megatron: seconds

    launch(checked, resume=resume, overwrite=overwrite)


@app.command()
def grads(
    hf: Annotated[Path, typer.Option(help="Hugging Face directory of a dense Qwen model.")],
    batch: Annotated[Path, typer.Option(help="JSONL, one sequence a line; see the README.")],
    out: Annotated[Path, typer.Option(help="safetensors file to write.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes such as parallel.tensor=2.")
    ] = None,
) -> None:
    """Write the projected gradient of every parameter, unsharded. No optimizer step is made."""
    config = gradients_config(overrides or [])
    from proma_megatron.exactness.grads import grads as run

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
    from proma_megatron.exactness.verify import verify as run

    if not run(source, overrides or []):
        sys.exit(1)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, drawn into one picture.")],
    out: Annotated[Path | None, typer.Option(help="PNG to write; default RUN/report.png.")] = None,
) -> None:
    """Draw reward, entropy, KL and removed energy of finished or running runs."""
    from proma_megatron.report import draw_report, summarize

    target = out or runs[0] / "report.png"
    draw_report(runs, target)
    for run in runs:
        figures = ", ".join(f"{key} {value:.3f}" for key, value in summarize(run).items())
        print(f"{run}: {figures}")
    print(f"wrote {target}")


def main() -> None:
    """Entry point: config errors are one sentence and exit code 2, failures exit code 1."""
    try:
        app(standalone_mode=True)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":  # under torchrun every rank finds the same fault
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        from proma_megatron.failure import WorkerError
        from proma_megatron.rollout.rewards import RewardError

        if not isinstance(error, WorkerError | RewardError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
