"""Ranks as processes of their own that start in milliseconds.

Importing torch and Megatron takes seconds a process. A fork server has imported them (see
`preloaded`) and a rank is forked from it. Apart from that it is what the launcher starts: a process
with torchrun's variables, that can be stopped and killed, and may start processes itself. What a
fork hides: all ranks hash strings alike, so they also agree where only sets have put things in
order. Runs that the launcher and torchrun start in the tests don't.

The server is not the one of multiprocessing's own context, which belongs to the product: its
scoring processes come from a bare interpreter, in this process and in ranks.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection, forkserver, popen_forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Self
from unittest import mock

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from proma_megatron.config.trainer import ProcessConfig
from proma_megatron.processes import entry, logs
from proma_megatron.processes.failures import LAUNCHED, first_error, forget_earlier
from proma_megatron.processes.stopping import read_stop

_PRELOADED = "support.preloaded"
_END_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_GRACE_SECONDS = 0.5  # between SIGTERM and SIGKILL

_server = forkserver.ForkServer()
_server.set_forkserver_preload([_PRELOADED])
_running: set[Ranks] = set()


class Process(ForkServerProcess):
    """A process whose modules are loaded when it starts; its environment is the caller's.

    On the server's standard streams, which are those of the test session.
    """

    def __init__(
        self,
        target: Callable[..., object],
        args: Sequence[Any],
        *,
        env: Mapping[str, str] | None = None,
        daemon: bool = False,
    ) -> None:
        """
        Args:
            env: variables on top of the caller's.
        """
        super().__init__(target=target, args=args, daemon=daemon)
        self._environment = {**os.environ, **(env or {})}

    def run(self) -> None:
        _become_own_process(self._environment)
        super().run()

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 - named as multiprocessing does
        return _Popen(process_obj)


class _Popen(popen_forkserver.Popen):
    def _launch(self, process_obj: Any) -> None:
        # The server starts with the first process. It takes sys.path from there only: Python 3.12
        # hands it over, but doesn't set it.
        search = {"PYTHONPATH": os.pathsep.join(sys.path)}
        with mock.patch.dict(os.environ, search):
            _server.ensure_running()
        ours = mock.patch.object(
            forkserver, "connect_to_new_process", _server.connect_to_new_process
        )
        with ours:
            super()._launch(process_obj)  # type: ignore[misc]


def _become_own_process(environment: Mapping[str, str]) -> None:
    """Cut what ties a forked process to its server."""
    from support import preloaded

    if os.getpid() == preloaded.LOADED_BY:
        raise RuntimeError(f"the fork server could not import {_PRELOADED}; see its error above")
    os.environ.clear()
    os.environ.update(environment)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGKILL)
    inherited: Any = forkserver._forkserver
    os.close(inherited._forkserver_alive_fd)  # the server ends with the test session
    inherited.__init__()  # what this process starts by a fork server comes from a server of its own


# --------------------------------------------------------------------------- ranks


class Ranks:
    """Ranks that were started, in order."""

    def __init__(self) -> None:
        self._processes: list[Process] = []
        self.stdout: list[Path] = []
        self.stderr: list[Path] = []
        _running.add(self)

    def start(self, process: Process, stdout: Path, stderr: Path) -> None:
        process.start()
        self._processes.append(process)
        self.stdout.append(stdout)
        self.stderr.append(stderr)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes if process.pid is not None]

    def wait(self, timeout: float) -> list[int]:
        """Exit codes by rank, of one that a signal ended its negative number.

        Raises:
            TimeoutError: some did not end in time; they are killed.
        """
        deadline = time.monotonic() + timeout
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = self.exit_codes()
        if None in codes:
            self.kill()
            raise TimeoutError(f"after {timeout} s the exit codes are {codes}")
        return [code for code in codes if code is not None]

    def wait_for_first_failure(self) -> list[int | None]:
        """Wait until a rank has failed or all are done; exit codes, None of those that run."""
        while None in (codes := self.exit_codes()) and not any(codes):
            going = [process.sentinel for process in self._processes if process.exitcode is None]
            if going:  # else they have ended just now; without any this would wait for ever
                connection.wait(going)
        return codes

    def exit_codes(self) -> list[int | None]:
        return [process.exitcode for process in self._processes]

    def end(self) -> None:
        """SIGTERM, which a rank may answer, then SIGKILL."""
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + _GRACE_SECONDS
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End those that still run, also stopped ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        _running.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def start_ranks(
    count: int,
    function: Callable[..., object],
    *args: Any,
    logs: Path,
    env: Mapping[str, str] | None = None,
) -> Ranks:
    """Run ``function(*args)`` on each rank; what it prints is in ``logs/rank<r>.out`` and ``.err``.

    Args:
        env: variables on top of this process's own and torchrun's.
    """
    logs.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    ranks = Ranks()
    for rank in range(count):
        streams = logs / f"rank{rank}.out", logs / f"rank{rank}.err"
        variables = {**_of_torchrun(rank, count, port), **(env or {})}
        ranks.start(Process(_rank, (streams, function, *args), env=variables), *streams)
    return ranks


def _rank(streams: tuple[Path, Path], function: Callable[..., object], *args: Any) -> None:
    for number, path in enumerate(streams, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.modules["__main__"] = entry  # which scoring processes import
    function(*args)


def _of_torchrun(rank: int, count: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def end_all() -> None:
    """End the ranks that tests have left, and the server, with which all of its processes end."""
    for ranks in list(_running):
        ranks.kill()
    server: Any = _server
    if server._forkserver_pid is not None:
        os.kill(server._forkserver_pid, signal.SIGKILL)
        server._stop()


# --------------------------------------------------------------------------- the launcher


def forked_start_ranks(
    module: str,
    arguments: Sequence[str],
    *,
    count: int,
    name: str,
    logs: Path,
    process: ProcessConfig,
    graceful: bool = False,
    main: Callable[..., object] | None = None,
) -> None:
    """In place of `workers.start_ranks`: the same ranks, forked; none is ever started again.

    When one fails the others are ended within a second. What rank 0 prints is printed at the end.
    A signal to this process is neither passed on nor turned into a `StoppedError`.

    Args:
        graceful: makes no difference.
        main: what a rank runs with module and arguments instead of `run_main`.
    """
    forget_earlier(logs)
    environment = {
        "OMP_NUM_THREADS": str(process.threads),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        LAUNCHED: str(os.getpid()),
    }
    main = main or run_main
    with start_ranks(count, main, module, arguments, logs=logs, env=environment) as ranks:
        codes = ranks.wait_for_first_failure()
        failures = {rank: _failure(ranks, rank, code) for rank, code in enumerate(codes) if code}
        ranks.end()
    with contextlib.suppress(FileNotFoundError):  # a drill may have moved the folder away
        print(ranks.stdout[0].read_text(), end="")
        print(ranks.stderr[0].read_text(), end="", file=sys.stderr)
    if failures:
        raise first_error(logs, ChildFailedError(name, failures)) from None
    stopped = read_stop(logs)
    if stopped is not None:
        raise stopped


def _failure(ranks: Ranks, rank: int, code: int) -> ProcessFailure:
    return ProcessFailure(rank, ranks.pids[rank], code, error_file="")


def run_main(module: str, arguments: Sequence[str]) -> None:
    """Do what `processes.entry` does with its arguments."""
    logs.configure()
    importlib.import_module(module).main(arguments)
