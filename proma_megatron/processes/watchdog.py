"""Find a hang: a phase that takes longer than it may ends the run, with every rank's Python stack.

A thread of each rank looks twice a second. The first rank of a machine to be late writes its own
stacks, has its peers there write theirs, says in one sentence what it found, and ends its process;
the launcher ends the others.

``logs/stacks/rank_000.txt`` begins with a line that always says what the rank is at. Below it are
the Python stacks of all threads, each time that

- a phase was late, here or in a peer;
- ``kill -USR2 PID`` asked for them, which the rank survives;
- the rank crashed (SIGSEGV, SIGABRT, ...), or our launcher ended it after another one had died.

``rank_000_scoring.txt`` has those of its scoring processes, where a phase was late.

Python's faulthandler writes them from the signal handler itself: also in the middle of a
collective, and of an extension that holds Python's lock. Only the watching needs that lock: where
an extension keeps it for ever, a peer is late. A lone rank in such a state is not found.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from proma_megatron.config.trainer import PhaseMinutes
from proma_megatron.errors import HangError
from proma_megatron.processes.failures import LAUNCHED, end, in_words, record_error, stacks_folder

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_STALL_SECONDS = 5.0  # a look that comes this much later: the whole process was suspended
_ANSWER_SECONDS = 2.0  # for peers to write their stacks
_OTHERS_SECONDS = 20.0  # for the rank that was late first to end the run
_HEADING_BYTES = 240  # written over in place, so that stacks stay below it

_SCORING = "PROMA_SCORING_STACKS"  # in the environment of scoring processes: their file

_ALIASES = {"kl_lagged": "kl"}  # phases that share a limit
_STATES = {
    "T": "it is stopped",
    "t": "a debugger has stopped it",
    "D": "it waits in the kernel, where no signal reaches it",
    "Z": "it has ended",
    "X": "it has ended",
}


@dataclass
class _Phase:
    name: str
    began: float
    minutes: float | None

    def over(self, now: float) -> bool:
        return self.minutes is not None and now - self.began > 60 * self.minutes


class Phases:
    """What this rank is at, and since when.

    Phases nest, and each has its own limit: an outer one's counts while inner ones come and go.
    A name that `PhaseMinutes` doesn't have is without limit.
    """

    def __init__(
        self,
        limits: PhaseMinutes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with nothing open.

        Args:
            limits: None: no limits at all.
        """
        self.step = 0  # for those who read the stacks; of the warm start, then of RL
        self.changed: Callable[[], None] = lambda: None  # called when a phase begins or ends
        self._limits = {} if limits is None else limits.model_dump()
        self._clock = clock
        self._open: tuple[_Phase, ...] = ()  # replaced as a whole: the thread reads it

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = self._open
        minutes = self._limits.get(_ALIASES.get(name, name))
        self._open = (*before, _Phase(name, self._clock(), minutes))
        logger.debug("%s", self)
        self.changed()
        try:
            yield
        finally:
            self._open = before
            self.changed()

    def late(self) -> str | None:
        """Say what is late, in words; None: nothing."""
        now = self._clock()
        for phase in self._open:
            if phase.over(now):
                key = f"trainer.phase_minutes.{_ALIASES.get(phase.name, phase.name)}"
                return (
                    f"{now - phase.began:.0f} s in phase {phase.name} of step {self.step}, more "
                    f"than {key}={phase.minutes:g} allows"
                )
        return None

    def excuse(self, seconds: float) -> None:
        """Leave these seconds out of what is open."""
        for phase in self._open:
            phase.began += seconds

    def __str__(self) -> str:
        if not self._open:
            return f"step {self.step}, between phases"
        return f"step {self.step}, phase {' > '.join(phase.name for phase in self._open)}"


class Watchdog:
    """A thread that ends this process, within the ``with`` block, when a phase of it is late."""

    def __init__(self, logs: Path, phases: Phases, rank: int) -> None:
        """Begin with no peers.

        Args:
            logs: the run's folder for logs, which is there.
        """
        self._logs, self._phases, self._rank = logs, phases, rank
        self._folder = stacks_folder(logs)
        self._peers: Mapping[int, int] = {}
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        self._folder.mkdir(exist_ok=True)
        self._file = self._path(self._rank).open("wb", buffering=0)
        self._phases.changed = self._write_heading
        os.environ[_SCORING] = str(self._scoring(self._rank).resolve())
        self._write_heading()
        os.lseek(self._file.fileno(), 0, os.SEEK_END)
        faulthandler.enable(self._file, all_threads=True)
        faulthandler.register(signal.SIGUSR2, self._file, all_threads=True)
        if LAUNCHED in os.environ:
            # With which elastic ends the peers of a dead rank; the signal's own action follows.
            faulthandler.register(signal.SIGTERM, self._file, all_threads=True, chain=True)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        os.environ.pop(_SCORING, None)
        self._phases.changed = lambda: None
        faulthandler.unregister(signal.SIGUSR2)
        faulthandler.unregister(signal.SIGTERM)
        faulthandler.disable()
        self._file.close()

    def meet_peers(self) -> None:
        """Learn the process ids of the ranks on this machine; a collective of all ranks."""
        import torch.distributed as dist

        # Containers of one machine may share a name, and see each other's processes or not.
        place = (socket.gethostname(), str(Path("/proc/self/ns/pid").readlink()))
        everyone: list[tuple[tuple[str, str], int]] = [(place, 0)] * dist.get_world_size()
        dist.all_gather_object(everyone, (place, os.getpid()))
        self.peers_are({rank: pid for rank, (other, pid) in enumerate(everyone) if other == place})

    def peers_are(self, processes: Mapping[int, int]) -> None:
        """Take process ids by rank; this one's may be among them."""
        self._peers = {rank: pid for rank, pid in processes.items() if rank != self._rank}

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:03d}.txt"

    def _scoring(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:03d}_scoring.txt"

    @property
    def _claim(self) -> Path:
        return self._folder / f"late_on_{socket.gethostname()}"

    def _write_heading(self) -> None:
        text = (
            f"rank {self._rank}, pid {os.getpid()} on {socket.gethostname()}: "
            f"{self._phases} since {time.strftime('%H:%M:%S')}"
        )
        line = text.encode()[: _HEADING_BYTES - 1].ljust(_HEADING_BYTES - 1) + b"\n"
        with contextlib.suppress(OSError):  # a full disk is for others to report
            os.pwrite(self._file.fileno(), line, 0)

    # ------------------------------------------------------------------ the thread

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._closed.wait(_LOOK_SECONDS):
            now = time.monotonic()
            if now - looked > _LOOK_SECONDS + _STALL_SECONDS:
                # SIGSTOP, as Slurm suspends jobs with it. If it is only us, peers will be late.
                self._phases.excuse(now - looked)
            looked = now
            late = self._phases.late()
            if late is not None and self._first_here():
                self._end_run(late)
            elif self._claim.exists():
                self._follow(late)

    def _follow(self, late: str | None) -> None:
        """Ask the children, whom only we know; a peer has this rank's stacks and ends the run."""
        faulthandler.unregister(signal.SIGTERM)  # the stacks are written once, and now
        self._ask_scoring_processes()
        time.sleep(_OTHERS_SECONDS)
        if late is not None:
            end(1)

    def _end_run(self, late: str) -> None:
        faulthandler.unregister(signal.SIGTERM)  # the stacks are written once, and now
        error = HangError(f"rank {self._rank} has spent {late}; {self._collect(late)}")
        record_error(self._logs, error)
        if LAUNCHED not in os.environ:
            # Not by way of sys.stderr, whose lock the thread that hangs may hold.
            os.write(
                sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{in_words(error)}\n".encode()
            )
        end(1)

    def _first_here(self) -> bool:
        """Tell whether no other rank of this machine has found the hang before."""
        try:
            self._claim.touch(exist_ok=False)
        except OSError:
            return not self._claim.exists()  # where none can be written, everyone speaks up
        return True

    def _collect(self, late: str) -> str:
        """Write the stacks of all ranks here; return who did, and what keeps the others from it."""
        before = {self._path(rank): _size(self._path(rank)) for rank in self._peers}
        scoring = [path for path in map(self._scoring, self._peers) if path.exists()]
        before |= {path: _size(path) for path in scoring}
        os.write(self._file.fileno(), f"\nrank {self._rank}: {late}\n".encode())
        faulthandler.dump_traceback(self._file, all_threads=True)
        for pid in self._peers.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR2)
        self._ask_scoring_processes()
        unchanged = _wait_for_growth(before)
        silent = [rank for rank in sorted(self._peers) if self._path(rank) in unchanged]
        wrote = sorted({self._rank, *self._peers} - set(silent))
        words = [f"Python stacks of {_ranks(wrote)} are in {self._folder}"]
        words += [f"rank {rank} wrote none: {_state(self._peers[rank])}" for rank in silent]
        return "; ".join(words)

    def _ask_scoring_processes(self) -> None:
        """Ask one after the other, as they share a file, and they end with this rank."""
        path = self._scoring(self._rank)
        deadline = time.monotonic() + _ANSWER_SECONDS
        for child in multiprocessing.active_children():
            before = _size(path)
            if child.pid is None:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGUSR2)
            while _size(path) <= before and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.05)  # for it to come to the end of its stacks


def _wait_for_growth(before: Mapping[Path, int]) -> set[Path]:
    """Return files that have not grown beyond these sizes when the time is up."""
    deadline = time.monotonic() + _ANSWER_SECONDS
    unchanged = set(before)
    while unchanged and time.monotonic() < deadline:
        time.sleep(0.05)
        unchanged = {path for path in unchanged if _size(path) <= before[path]}
    time.sleep(0.1)  # for the last one to come to the end of its stacks
    return unchanged


def write_stacks_when_asked() -> None:
    """Let a scoring process's rank have its stacks, whatever it is at."""
    path = os.environ.get(_SCORING)
    if path is not None:
        file = Path(path).open("ab", buffering=0)  # noqa: SIM115 - faulthandler keeps it
        faulthandler.register(signal.SIGUSR2, file, all_threads=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def _state(pid: int) -> str:
    """Say why a process doesn't answer, as far as the kernel tells."""
    try:
        # The name before it, in brackets, may hold anything.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "it has ended"
    return f"{_STATES.get(state, 'it did not answer')} (state {state})"
