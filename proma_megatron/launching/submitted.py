"""Experiments that were submitted before, from NeMo-Run's records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nemo_run as run
from nemo_run.config import get_nemorun_home

from proma_megatron.errors import ConfigError


@dataclass(frozen=True)
class SubmittedJob:
    """One job of an experiment."""

    name: str  # "train"
    id: str  # Slurm's
    folder: str  # of its logs, where it runs
    tunnel: Any  # to its cluster; None: this machine ran it
    after: tuple[str, ...]  # jobs that must have succeeded before


@dataclass(frozen=True)
class Submitted:
    id: str
    jobs: tuple[SubmittedJob, ...]


def find(name: str | None) -> Submitted:
    """Find the experiment of this id; of this title, or of any: the newest.

    Raises:
        ConfigError: there is none.
    """
    home = Path(get_nemorun_home()) / "experiments"
    every = sorted(home.glob("*/*_*/_TASKS"), key=lambda path: path.stat().st_mtime)
    folders = [path.parent for path in every]
    matching = [
        folder for folder in folders if name is None or name in (folder.name, folder.parent.name)
    ]
    if not matching:
        known = ", ".join(folder.name for folder in folders[-3:]) or "none yet"
        asked = f"'{name}' is no experiment" if name else "there is no experiment"
        raise ConfigError(f"{asked} in {home}; the newest are: {known}")
    return _read(matching[-1].name)


def _read(id: str) -> Submitted:  # noqa: A002
    experiment = run.Experiment.from_id(id)
    jobs = []
    for job in experiment.jobs:
        executor = job.executor
        slurm = isinstance(executor, run.SlurmExecutor)
        folder = executor.job_dir
        if slurm:
            folder = f"{executor.tunnel.job_dir}/{Path(executor.job_dir).name}"
        jobs.append(
            SubmittedJob(
                name=job.id,
                id=number_of(job.handle),
                folder=folder,
                tunnel=executor.tunnel if slurm else None,
                after=tuple(job.dependencies),
            )
        )
    return Submitted(id, tuple(jobs))


def number_of(handle: str) -> str:
    """Return a job's number, from NeMo-Run's handle slurm_tunnel://nemo_run/1234; "" if none."""
    return handle.rpartition("://")[2].split("/")[1] if handle else ""
