"""Commands whose ranks are processes of the pool: starting them takes seconds."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from proma_megatron.commands.train.command import _prepare
from proma_megatron.commands.train.rank import _run_in_group
from proma_megatron.config.loading import load_config
from proma_megatron.config.run import RunConfig
from proma_megatron.distributed.topology import layout
from proma_megatron.processes.ranks import SUMMARY
from proma_megatron.rewards.pool import Scorer
from proma_megatron.runs.directory import RunDir
from support.pool import WorkerPool


def count_digits(prompt: str, completion: str, reference: str) -> float:
    """A reward that tells an untrained policy's completions apart."""
    return float(sum(character.isdigit() for character in completion))


@contextmanager
def _as_a_rank(paths: Sequence[str]) -> Iterator[None]:
    """Modules are found where the test finds them; rewards run in the rank itself.

    A rank of the pool may start no processes.
    """
    before, in_pool = list(sys.path), Scorer._judge_in_pool
    sys.path[:0] = [path for path in paths if path not in before]
    Scorer._judge_in_pool = Scorer._judge_here
    try:
        yield
    finally:
        sys.path[:], Scorer._judge_in_pool = before, in_pool


def rank_of_run(device: torch.device, path: Path, resume: bool, paths: Sequence[str]) -> None:
    """One rank of the run that this directory holds."""
    with _as_a_rank(paths):
        _run_in_group(load_config(path / "config.yaml"), RunDir(path), device, resume)


def rank_of_job(device: torch.device, name: str, path: Path, paths: Sequence[str]) -> str | None:
    """Run one rank of a command's job, which this file holds."""
    with _as_a_rank(paths):
        module = importlib.import_module(name)
        job = module.JOB.model_validate_json(path.read_text())
        with layout(job.config.parallel, device, job.config.seed) as topology:
            return module.run(job, topology)


class PooledStarter:
    """A starter whose ranks are those of the pool."""

    def __init__(self, workers: WorkerPool) -> None:
        self.workers = workers

    def __call__(self, module: str, arguments: Sequence[str], *, count: int, **_: Any) -> None:
        if module == "proma_megatron.processes.ranks":
            name, path, folder = arguments
            job = {"name": name, "path": Path(path).resolve(), "paths": sys.path}
            summary = self.workers.run(count, rank_of_job, **job)[0]
            if summary is not None:
                (Path(folder) / SUMMARY).write_text(summary)
            return
        assert module == "proma_megatron.commands.train.rank"
        path, *flags = arguments
        self.workers.run(
            count,
            rank_of_run,
            path=Path(path).resolve().parent,
            resume="--resume" in flags,
            paths=sys.path,
        )


def run_in_pool(workers: WorkerPool, config: RunConfig, *, resume: bool = False) -> RunDir:
    """The whole run, from its checks on; overwrites one that is there, or resumes it."""
    run_dir = _prepare(config, resume=resume, overwrite=not resume)
    arguments = [str(run_dir.config), *(["--resume"] if resume else [])]
    count = config.parallel.world_size
    PooledStarter(workers)("proma_megatron.commands.train.rank", arguments, count=count)
    return run_dir


def rl_rows(run_dir: RunDir) -> list[dict[str, Any]]:
    """The rows of RL steps in metrics.jsonl, without what took how long."""
    rows = map(json.loads, run_dir.metrics.read_text().splitlines())
    return [untimed(row) for row in rows if row["phase"] == "rl"]


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith(TIMES)}


TIMES: tuple[str, ...] = ("seconds/", "tokens/second", "save/")
TINY_RUN: Sequence[str] = (
    "model={hidden_size: 32, ffn_hidden_size: 64, layers: 2, head_dim: 8}",
    "data={train_problems: 200, validation_problems: 4, largest_number: 9, solution_steps: 1}",
    "rollout={prompts_per_step: 4, samples_per_prompt: 4, max_new_tokens: 6}",
    "rollout.max_prompt_tokens=40",
    "batching={tokens_per_microbatch: 120, minibatches: 2}",
    "reward.function=support.pooled:count_digits",
    "optimizer.lr=0.01",
    "trainer={steps: 2, eval_every: 0, kl_every: 1, kl_step_every: 1, kl_lagged_every: 1}",
)


def rarely(prompt: str, completion: str, reference: str) -> float:
    """A reward that is the same for most groups of an untrained policy."""
    return float(any(character.isdigit() for character in completion))
