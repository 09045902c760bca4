"""Start one process per rank of a layout on this node: with torch elastic, or another starter."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

from proma_megatron.config.trainer import ProcessConfig
from proma_megatron.errors import RunStopped, StoppedError
from proma_megatron.processes.failures import LAUNCHED, first_error, forget_earlier
from proma_megatron.processes.signals import Forwarder
from proma_megatron.processes.stopping import read_stop, write_stop

logger = logging.getLogger(__name__)

_END_SECONDS = 3  # from a SIGTERM to a rank, once another one has failed, to SIGKILL


class Starter(Protocol):
    """What starts ranks and waits for them; `start_ranks` says what it is asked for."""

    def __call__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        count: int,
        name: str,
        logs: Path,
        process: ProcessConfig,
        graceful: bool = False,
    ) -> None: ...


def start_ranks(
    module: str,
    arguments: Sequence[str],
    *,
    count: int,
    name: str,
    logs: Path,
    process: ProcessConfig,
    graceful: bool = False,
) -> None:
    """Run ``module.main(arguments)`` on ``count`` ranks, to the end.

    Rank 0 has the terminal; what the others print goes to ``logs``. The processes are torch
    elastic's, unless `starting_ranks` names another starter.

    Args:
        graceful: ranks are asked to stop, instead of ended, by SIGTERM, SIGUSR1 and a first SIGINT.

    Raises:
        ConfigError, RewardError, WorkerError: what the rank that failed first left behind.
        RunStopped: the ranks stopped early, with everything saved.
        StoppedError: a signal ended the launcher.
    """
    start = _starter.get() or _start_by_elastic
    logger.debug("%s ranks of %s %s; logs in %s", count, module, " ".join(arguments), logs)
    start(
        module,
        arguments,
        count=count,
        name=name,
        logs=logs,
        process=process,
        graceful=graceful,
    )


_starter: ContextVar[Starter | None] = ContextVar("starter", default=None)


@contextlib.contextmanager
def starting_ranks(by: Starter) -> Iterator[None]:
    """Let `start_ranks` ask this starter within the ``with`` block, whichever command calls it.

    For processes that are there already, such as those that tests share.
    """
    before = _starter.set(by)
    try:
        yield
    finally:
        _starter.reset(before)


def _start_by_elastic(
    module: str,
    arguments: Sequence[str],
    *,
    count: int,
    name: str,
    logs: Path,
    process: ProcessConfig,
    graceful: bool = False,
) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    forget_earlier(logs)
    for noisy in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    os.environ[LAUNCHED] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(process.threads))
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    ending = ["SIGHUP", "SIGQUIT", *([] if graceful else ["SIGTERM", "SIGINT"])]
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=name,
        max_restarts=0,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(
            log_dir=str(logs), redirects=dict.fromkeys(range(1, count), Std.ALL)
        ),
        signals_to_handle=",".join(ending),
        shutdown_timeout=_END_SECONDS,
    )
    forwarder = Forwarder()
    with _quick_end() as ended, forwarder if graceful else contextlib.nullcontext():
        try:
            elastic_launch(launch, entrypoint=sys.executable)(
                "-u", "-m", "proma_megatron.processes.entry", module, *arguments
            )
        except ChildFailedError as failure:
            raise first_error(logs, failure, ended) from None
        except SignalException as stop:
            # A graceful launcher is ended by its second Ctrl-C, which elastic knows as SIGTERM.
            sent = signal.SIGINT if graceful and stop.sigval == signal.SIGTERM else stop.sigval
            raise StoppedError(f"stopped by signal {sent.name}") from None
    stopped = read_stop(logs)
    if stopped is not None:
        raise _as_asked(stopped, forwarder.request, logs)


def _as_asked(stopped: RunStopped, request: str | None, logs: Path) -> RunStopped:
    """Return the stop with the signal that the launcher got, not the one that it passed on."""
    if request is None or stopped.reason != signal.SIGUSR1.name:
        return stopped
    renamed = RunStopped(request, stopped.step, stopped.checkpoint)
    write_stop(renamed, logs)
    return renamed


@contextlib.contextmanager
def _quick_end() -> Iterator[set[int]]:
    """Let elastic end the peers of a dead rank within seconds; yield which ones.

    ``shutdown_timeout`` is not asked there: a rank that doesn't react to SIGTERM, for instance
    because it was suspended, would be waited for 30 s. And afterwards nobody could tell such a
    rank, which SIGKILL ended, from one that died of it first.
    """
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

    ended: set[int] = set()
    patient: Any = SubprocessContext._close

    def close(self: SubprocessContext, death_sig: signal.Signals, timeout: int = 0) -> None:
        handlers = self.subprocess_handlers.items()
        ended.update(rank for rank, handler in handlers if handler.proc.poll() is None)
        patient(self, death_sig, _END_SECONDS)

    SubprocessContext._close = close
    try:
        yield ended
    finally:
        SubprocessContext._close = patient
