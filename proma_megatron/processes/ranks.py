"""Commands that run once on the ranks of a layout: told by one JSON file, answering with another.

A command says by its dotted name which module its ranks run: it loads Megatron, which the command
itself does not. Such a rank module has

    JOB = ExportJob  # what its ranks are told, a section with a `config`
    def run(job: ExportJob, topology: Topology) -> str | None: ...  # rank 0 returns a summary

and its `main` is the one below. Under torchrun or srun the ranks are there already.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from proma_megatron.config.model import ParallelConfig
from proma_megatron.config.run import GradientsConfig, RunConfig
from proma_megatron.config.trainer import ProcessConfig
from proma_megatron.distributed.devices import (
    check_backend,
    check_world_size,
    choose_device,
    describe,
    ranks_on,
)
from proma_megatron.errors import StoppedError, WorkerError
from proma_megatron.processes.elastic import start_ranks
from proma_megatron.processes.entry import defer_compilation
from proma_megatron.processes.slurm import adopt_slurm

if TYPE_CHECKING:
    from proma_megatron.distributed.topology import Topology


logger = logging.getLogger(__name__)

SUMMARY = "summary.json"  # in the folder of a job: what was run, and what came out


class JobConfig(Protocol):
    """What a job's configuration says of its processes."""

    @property
    def device(self) -> str: ...

    @property
    def seed(self) -> int: ...

    @property
    def parallel(self) -> ParallelConfig: ...

    @property
    def trainer(self) -> ProcessConfig: ...


class Job(Protocol):
    """What the ranks of a command are told: a section that holds their configuration."""

    @property
    def config(self) -> JobConfig: ...

    def model_dump_json(self) -> str: ...


# --------------------------------------------------------------------------- the launching half


def already_started() -> bool:
    """Tell whether torchrun or srun started this process as a rank."""
    return "RANK" in os.environ


def is_first_rank() -> bool:
    """Tell whether this process is the one that speaks and writes: rank 0, or a launcher."""
    return os.environ.get("RANK", "0") == "0"


def as_started[Config: GradientsConfig | RunConfig](config: Config) -> Config:
    """Return the configuration with the replicas that torchrun's or srun's processes make.

    Where neither has started this process it is the configuration as it was. A task of srun has
    torchrun's variables from here on.

    Raises:
        ConfigError: they don't make a whole number, or not the one that is asked for.
    """
    adopt_slurm(os.environ)
    if not already_started():
        return config
    world, parallel = int(os.environ["WORLD_SIZE"]), config.parallel
    check_world_size(parallel, world)
    replicas = parallel.model_copy(update={"data": world // parallel.model_size})
    return config.model_copy(update={"parallel": replicas})


def run_on_ranks[J: Job](
    rank: str,
    job: J,
    *,
    purpose: str,
    folder: Path | None = None,
    stage: Callable[[J, Path], J] | None = None,
) -> str | None:
    """Run ``rank.run(job, topology)`` on every rank of the job's layout, to the end.

    Joins the ranks that torchrun or srun started, or starts them on this machine.

    Args:
        rank: dotted name of the rank module.
        purpose: of the job, in the name of its folder, "export".
        folder: takes the job and what the ranks print; None: a temporary one. Not used by ranks
            that are there already, whose launcher keeps what they print.
        stage: puts into the folder what only this process can read, and returns the job that
            names it there; called where ranks are started.

    Returns:
        The summary of rank 0; None on the others.

    Raises:
        ConfigError: there are too few GPUs for the layout, or what a rank found wrong.
        RewardError, WorkerError: a rank failed.
    """
    if already_started():
        return join_ranks(rank, job)
    with nullcontext(folder) if folder is not None else job_folder(purpose) as place:
        return _start(rank, job if stage is None else stage(job, place), place, purpose)


def _start(rank: str, job: Job, folder: Path, purpose: str) -> str:
    config = job.config
    count = config.parallel.world_size
    device = choose_device(config.device, count)
    if isinstance(config, GradientsConfig):  # others only sample and read, which no FP8 layer does
        check_backend(config.model, device)
    say(f"{describe(config.parallel)}: {ranks_on(count, device)}")
    path = folder / "job.json"
    path.write_text(job.model_dump_json())
    start_ranks(
        "proma_megatron.processes.ranks",
        [rank, str(path), str(folder)],
        count=count,
        name=purpose,
        logs=folder,
        process=config.trainer,
    )
    return (folder / SUMMARY).read_text()


@contextmanager
def job_folder(purpose: str) -> Iterator[Path]:
    """Make a temporary folder; what ranks printed is kept in it if one of them failed."""
    folder = Path(tempfile.mkdtemp(prefix=f"proma-{purpose}-"))
    try:
        yield folder
    except BaseException as error:
        if isinstance(error, WorkerError) and not isinstance(error, StoppedError):
            for tensors in folder.rglob("*.safetensors"):
                tensors.unlink()
            logger.error("what the ranks printed is in %s", folder)
        else:
            shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def say(text: str) -> None:
    """Tell the person at the terminal, once; standard output is for results."""
    if is_first_rank():
        logger.info("%s", text)


# --------------------------------------------------------------------------- the ranks


def join_ranks(rank: str, job: Job) -> str | None:
    """Run the job on this rank, one of those that torchrun or srun started."""
    with _results_only():
        defer_compilation()
        return run_rank(importlib.import_module(rank), job, None)


def serve_rank(rank: str, path: Path, folder: Path) -> None:
    """Run the job of this file on this rank, which `run_on_ranks` started."""
    from proma_megatron.processes.failures import fail

    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the launcher prints the result
    try:
        module = importlib.import_module(rank)
        job = module.JOB.model_validate_json(path.read_text())
        summary = run_rank(module, job, folder)
        if summary is not None:
            (folder / SUMMARY).write_text(summary)
    except Exception as error:
        fail(folder, error)


def main(arguments: Sequence[str]) -> None:
    """Serve as one rank: the name of the rank module, the file of the job, the job's folder."""
    rank, path, folder = arguments
    serve_rank(rank, Path(path), Path(folder))


def run_rank(module: Any, job: Job, logs: Path | None) -> str | None:
    """Run ``module.run`` on this rank, by torchrun's environment variables.

    Args:
        logs: where a rank that fails says so; None: on standard error only.
    """
    return on_layout(job.config, logs, lambda topology: module.run(job, topology))


@contextmanager
def _results_only() -> Iterator[None]:
    """Send what is printed within it, also by imports, to standard error."""
    sys.stdout.flush()
    stdout = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, sys.stdout.fileno())
        os.close(stdout)


def on_layout[Result](
    config: JobConfig, logs: Path | None, run: Callable[[Topology], Result]
) -> Result:
    """Call ``run`` on this rank, in the configuration's layout; a failure ends the process.

    Args:
        logs: where a rank that fails says so; None: on standard error only.
    """
    import torch

    from proma_megatron.distributed.topology import layout, process_group
    from proma_megatron.processes.failures import fail

    device_type = choose_device(config.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    minutes = config.trainer.timeout_minutes
    if device_type == "cpu":
        torch.set_num_threads(config.trainer.threads)
    with process_group(device_type, minutes) as device:
        try:
            with layout(config.parallel, device, config.seed, minutes) as topology:
                logger.debug("%s, on %s", describe(config.parallel), device)
                try:
                    return run(topology)
                except BaseException as error:  # before the groups go, and the peers fail of it
                    fail(logs, error)
        except BaseException as error:
            fail(logs, error)
