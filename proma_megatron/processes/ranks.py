"""Commands that run once on the ranks of a layout: told by one JSON file, answering with another.

The launching half loads no Megatron. Under torchrun or srun the ranks are there already.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from proma_megatron.config.run import GradientsConfig, RunConfig
from proma_megatron.config.sections import ParallelConfig, ProcessConfig, Section
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

if TYPE_CHECKING:
    from proma_megatron.distributed.topology import Topology


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


# --------------------------------------------------------------------------- the launching half


def already_started() -> bool:
    """Whether torchrun or srun started this process as a rank."""
    return "RANK" in os.environ


def is_first_rank() -> bool:
    """Whether this process is the one that speaks and writes: rank 0, or a launcher."""
    return os.environ.get("RANK", "0") == "0"


def as_started[Config: GradientsConfig | RunConfig](config: Config) -> Config:
    """The configuration with the replicas that the processes make, where these are there already.

    Raises:
        ConfigError: they don't make a whole number, or not the one that is asked for.
    """
    if not already_started():
        return config
    world, parallel = int(os.environ["WORLD_SIZE"]), config.parallel
    check_world_size(parallel, world)
    replicas = parallel.model_copy(update={"data": world // parallel.model_size})
    return config.model_copy(update={"parallel": replicas})


def run_job(module: str, job: Section, config: JobConfig, folder: Path, name: str) -> str:
    """Run ``module.main`` on the ranks of a layout on this machine, to the end.

    ``folder`` takes the job and what the ranks print.

    Returns:
        The summary that rank 0 wrote, JSON.

    Raises:
        ConfigError: there are too few GPUs for the layout, or what a rank found wrong.
        RewardError, WorkerError: a rank failed.
    """
    workers = config.parallel.world_size
    device = choose_device(config.device, workers)
    if isinstance(config, GradientsConfig):  # others only sample and read, which no FP8 layer does
        check_backend(config.model, device)
    say(f"{describe(config.parallel)}: {ranks_on(workers, device)}")
    path = folder / "job.json"
    path.write_text(job.model_dump_json())
    start_ranks(
        module,
        [str(path), str(folder)],
        count=workers,
        name=name,
        logs=folder,
        process=config.trainer,
    )
    return (folder / SUMMARY).read_text()


def say(text: str) -> None:
    """A line for the person at the terminal; standard output is for results."""
    if is_first_rank():
        print(text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------- the ranks


def take_part[Job](job: Job, run: Callable[[Job, Path | None], str | None]) -> None:
    """One rank among those that torchrun or srun started; rank 0 prints the summary."""
    stdout = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # also what imports print
    defer_compilation()
    summary = run(job, None)
    if summary is not None:
        os.write(stdout, summary.encode() + b"\n")


def serve[Job: Section](
    arguments: Sequence[str], kind: type[Job], run: Callable[[Job, Path | None], str | None]
) -> None:
    """The ``main`` of a rank that `run_job` started."""
    from proma_megatron.processes.failures import fail

    path, logs = map(Path, arguments)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # standard output is for the result
    try:
        summary = run(kind.model_validate_json(path.read_text()), logs)
        if summary is not None:
            (logs / SUMMARY).write_text(summary)
    except Exception as error:
        fail(logs, error)


def on_layout[Result](
    config: JobConfig, logs: Path | None, run: Callable[[Topology], Result]
) -> Result:
    """``run`` on this rank, in the configuration's layout; a failure ends the process.

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
                try:
                    return run(topology)
                except BaseException as error:  # before the groups go, and the peers fail of it
                    fail(logs, error)
        except BaseException as error:
            fail(logs, error)


SUMMARY = "summary.json"  # in the folder of a job: what was run, and what came out


@contextmanager
def job_folder(purpose: str) -> Iterator[Path]:
    """A temporary folder; what ranks printed is kept in it if one of them failed."""
    folder = Path(tempfile.mkdtemp(prefix=f"proma-{purpose}-"))
    try:
        yield folder
    except BaseException as error:
        if isinstance(error, WorkerError) and not isinstance(error, StoppedError):
            for tensors in folder.rglob("*.safetensors"):
                tensors.unlink()
            print(f"what the ranks printed is in {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
