"""`proma verify`: the same projected accumulation in a layout and in one process, compared."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from proma_megatron.batching.batch_file import write_batch
from proma_megatron.commands.gradients.command import RANK
from proma_megatron.commands.gradients.job import GradientJob
from proma_megatron.commands.verify.comparison import TOLERANCES, KindError, compare
from proma_megatron.commands.verify.subject import (
    Subject,
    random_batch,
    read_subject,
)
from proma_megatron.config.choices import RULES
from proma_megatron.config.model import ParallelConfig
from proma_megatron.config.run import GradientsConfig
from proma_megatron.distributed.devices import choose_device, describe, ranks_on
from proma_megatron.errors import ConfigError
from proma_megatron.processes.ranks import already_started, job_folder, run_on_ranks
from proma_megatron.processes.slurm import adopt_slurm
from proma_megatron.projection.units import layer_of


def verify(source: Path, overrides: Sequence[str]) -> bool:
    """Run the layout and one process on a random batch; print the comparison.

    Returns:
        Whether every tensor is within the tolerance of its dtype.

    Raises:
        ConfigError: the configuration, the model or the layout don't fit.
        WorkerError: a rank failed.
    """
    adopt_slurm(os.environ)
    if already_started():
        raise ConfigError("proma verify starts its own workers; run it without torchrun or srun")
    subject = read_subject(source, overrides)
    parallel = subject.config.parallel
    if subject.model.fp8 != "none":
        raise ConfigError(
            f"model.fp8 is '{subject.model.fp8}', whose scales depend on the layout, so that "
            "layouts differ by more than rounding; verify with model.fp8=none"
        )
    device = choose_device(subject.config.device, parallel.world_size)
    config = subject.config.model_copy(update={"device": device})
    alone = config.model_copy(update={"parallel": ParallelConfig()})
    with job_folder("verify") as folder:
        write_batch(folder / "batch.jsonl", random_batch(subject))
        summary = _run(subject, config, folder, "layout")
        _run(subject, alone, folder, "alone", chains=parallel.data or 1)
        errors = compare(folder / "layout.safetensors", folder / "alone.safetensors")
    return _show(errors, summary, subject, device)


def _run(
    subject: Subject, config: GradientsConfig, folder: Path, name: str, chains: int = 1
) -> dict[str, Any]:
    logs = folder / name
    logs.mkdir()
    job = GradientJob(
        config=config,
        model=subject.model,
        vocab_size=subject.vocab_size,
        weights=subject.weights,
        batch=folder / "batch.jsonl",
        chains=chains,
        out=folder / f"{name}.safetensors",
    )
    summary = run_on_ranks(RANK, job, purpose="verify", folder=logs)
    assert summary is not None, "this process starts the ranks, so it has the summary of rank 0"
    return json.loads(summary)


# --------------------------------------------------------------------------- what is shown


_REMOVED = {  # by what a rule acts on
    None: "the accumulated energy was projected away",
    "accumulated": "the accumulated energy was projected away",
    "microbatch": "the microbatches' own energy was projected away",
    "advantages": "the plain gradient's energy was changed",
}


def _show(
    errors: Sequence[KindError], summary: Mapping[str, Any], subject: Subject, device: str
) -> bool:
    dtype, rule = subject.config.model.dtype, subject.config.projection.rule
    tolerance = TOLERANCES[dtype]
    table = Table("parameter kind", "tensors", "largest error", "layer", "")
    for found in errors:
        verdict = "[green]PASS" if found.within(tolerance) else "[bold red]FAIL"
        layer = layer_of(found.where)
        where = "" if layer is None else str(layer)
        table.add_row(found.kind, str(found.tensors), f"{found.error:.1e}", where, verdict)
    console = Console()
    console.print(table)
    passed = all(found.within(tolerance) for found in errors)
    largest = max((found.error for found in errors), key=lambda e: (e != e, e))
    parallel = subject.config.parallel
    removed = summary["total"].get("removed_energy") or 0.0
    console.print(
        f"{'[green]PASS' if passed else '[bold red]FAIL'}[/]: {describe(parallel)} "
        f"({ranks_on(parallel.world_size, device)}) against one process, {dtype}, rule "
        f"{rule}: largest relative error {largest:.1e}, tolerance "
        f"{tolerance:.0e}; {removed:.1%} of {_REMOVED[RULES[rule].acts_on]}",
        highlight=False,
        soft_wrap=True,
    )
    return passed
