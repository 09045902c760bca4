"""`proma verify`: the same projected accumulation in a layout and in one process, compared."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from proma_megatron.batching.batch_file import write_batch
from proma_megatron.commands.gradients.command import run_gradients_job
from proma_megatron.commands.gradients.job import GradientJob
from proma_megatron.config.loading import gradients_config, load_config
from proma_megatron.config.sections import (
    ComputeConfig,
    ConfigError,
    GradientsConfig,
    ModelConfig,
    ParallelConfig,
    ProcessConfig,
    RunConfig,
    check_layout,
)
from proma_megatron.distributed.devices import choose_device
from proma_megatron.output import working_folder
from proma_megatron.processes.ranks import describe, workers_on
from proma_megatron.processes.slurm import adopt_slurm
from proma_megatron.projection.units import kind_of, layer_of
from proma_megatron.types import TrainingSequence
from proma_megatron.weights.huggingface import read_model

# Largest relative error of a tensor. In bfloat16 the forward pass of two layouts already differs in
# its third digit; docs/exactness.md has the figures.
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.25}
MICROBATCHES = 4  # of each replica, at least
SEQUENCES = (3, 2, 4, 1)  # of the microbatches, in turn
LENGTHS = (6, 24)  # tokens of a sequence
TOKEN_IDS = 24  # different ones


@dataclass(frozen=True)
class Subject:
    """What is verified: a model, where its weights come from, and how it is run."""

    config: GradientsConfig
    model: ModelConfig
    vocab_size: int
    weights: Path | None


@dataclass(frozen=True)
class KindError:
    """The largest relative error among the tensors of one kind."""

    kind: str
    tensors: int
    error: float  # |layout - one process| / |one process|, NaN if either is
    where: str  # the tensor

    def within(self, tolerance: float) -> bool:
        return self.error <= tolerance  # not so for NaN


def verify(source: Path, overrides: Sequence[str]) -> bool:
    """Run the layout and one process on a random batch; print the comparison.

    Returns:
        Whether every tensor is within the tolerance of its dtype.

    Raises:
        ConfigError: the configuration, the model or the layout don't fit.
        WorkerError: a rank failed.
    """
    adopt_slurm(os.environ)
    if "RANK" in os.environ:
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
    with working_folder("verify") as folder:
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
    return json.loads(run_gradients_job(job, logs))


# --------------------------------------------------------------------------- what to verify


def read_subject(source: Path, overrides: Sequence[str]) -> Subject:
    """A training configuration, or a Hugging Face directory, with what the user overrides.

    A Hugging Face directory is verified in float64 unless told otherwise. A layout of one process
    becomes two tensor ranks, unless the user asked for it.
    """
    if source.is_dir():
        config = gradients_config(["model.dtype=float64", *overrides])
        found = read_model(source, config.model)
        subject = Subject(config, found.model, found.vocab_size, source)
    else:
        subject = _from_run(load_config(source, overrides))
    if subject.config.parallel.world_size == 1:
        if any(item.startswith("parallel.") for item in overrides):
            raise ConfigError(
                "the layout is one process, so there is nothing to compare it with; give one of "
                "more, such as parallel.tensor=2"
            )
        print("the layout is one process; comparing parallel.tensor=2 with it", file=sys.stderr)
        two = subject.config.model_copy(update={"parallel": ParallelConfig(tensor=2)})
        subject = Subject(two, subject.model, subject.vocab_size, subject.weights)
    check_layout(subject.model, subject.config.parallel)
    return subject


def _from_run(run: RunConfig) -> Subject:
    from proma_megatron.data.loading import vocabulary

    config = GradientsConfig(
        device=run.device,
        seed=run.seed,
        model=ComputeConfig.model_validate(
            {key: getattr(run.model, key) for key in ComputeConfig.model_fields}
        ),
        parallel=run.parallel,
        projection=run.projection,
        trainer=ProcessConfig(
            timeout_minutes=run.trainer.timeout_minutes, threads=run.trainer.threads
        ),
    )
    weights = run.model.path if run.model.path is not None and run.model.path.is_dir() else None
    if weights is not None:
        found = read_model(weights, config.model)
        return Subject(config, found.model, found.vocab_size, weights)
    return Subject(config, run.model, vocabulary(run), None)


def random_batch(subject: Subject) -> list[list[TrainingSequence]]:
    """Microbatches of different numbers of sequences of different lengths.

    Few token ids, from all over the vocabulary: gradients of sequences that have nothing in common
    hardly overlap, and there would be next to nothing to project.
    """
    draw = random.Random(subject.config.seed)
    ids = draw.sample(range(subject.vocab_size), min(TOKEN_IDS, subject.vocab_size))
    parallel = subject.config.parallel
    count = max(MICROBATCHES, parallel.pipeline) * (parallel.data or 1)

    def sequence() -> TrainingSequence:
        length = draw.randint(*LENGTHS)
        prompt = draw.randint(1, length - 2)
        return TrainingSequence(
            tokens=tuple(draw.choices(ids, k=length)),
            loss_mask=tuple(int(at >= prompt) for at in range(length)),
            advantage=draw.gauss(0, 1),
            old_logprobs=(0.0,) * length,
        )

    return [[sequence() for _ in range(SEQUENCES[m % len(SEQUENCES)])] for m in range(count)]


# --------------------------------------------------------------------------- comparing


def compare(layout: Path, alone: Path) -> list[KindError]:
    """The largest relative error of each kind of parameter, by its name.

    Raises:
        RuntimeError: the files don't hold the same tensors.
    """
    worst: dict[str, KindError] = {}
    with safe_open(layout, framework="pt") as left, safe_open(alone, framework="pt") as right:
        if set(left.keys()) != set(right.keys()):
            raise RuntimeError(f"{layout} and {alone} hold different tensors")
        for name in right.keys():  # noqa: SIM118, it is no mapping
            found, expected = left.get_tensor(name).double(), right.get_tensor(name).double()
            error = relative_error(found, expected)
            kind = kind_of(name)
            before = worst.get(kind, KindError(kind, 0, -1.0, name))
            worse = not error <= before.error and before.error == before.error
            worst[kind] = KindError(
                kind,
                before.tensors + 1,
                error if worse else before.error,
                name if worse else before.where,
            )
    return sorted(worst.values(), key=lambda found: found.kind)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """``|found - expected| / |expected|``; NaN if either holds NaN."""
    difference, norm = float((found - expected).norm()), float(expected.norm())
    if difference == 0:
        return 0.0
    return difference / norm if norm else float("inf")


_ACCUMULATED = "the accumulated energy was projected away"
_REMOVED = {
    "none": _ACCUMULATED,
    "exact": _ACCUMULATED,
    "iterative": _ACCUMULATED,
    "ridge": _ACCUMULATED,
    "subspace": "the microbatches' own energy was projected away",
    "kernel": "the plain gradient's energy was changed",
    "norm": "the plain gradient's energy was changed",
}


def _show(
    errors: Sequence[KindError], summary: Mapping[str, Any], subject: Subject, device: str
) -> bool:
    dtype = subject.config.model.dtype
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
        f"({workers_on(parallel.world_size, device)}) against one process, {dtype}, rule "
        f"{subject.config.projection.rule}: largest relative error {largest:.1e}, tolerance "
        f"{tolerance:.0e}; {removed:.1%} of {_REMOVED[subject.config.projection.rule]}",
        highlight=False,
        soft_wrap=True,
    )
    return passed
