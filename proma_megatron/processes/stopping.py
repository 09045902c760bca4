"""Stop a run early with everything saved: on a signal, or before a wall-clock limit.

`StopSignals` notes what a rank was asked, `StopAgreement` makes all ranks of one mind about it, and
the trainer saves and raises `RunStopped`. All clocks are monotonic: setting the time changes
nothing. Nothing here loads torch before it is needed.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from proma_megatron.config.constants import STOPPED_FILE
from proma_megatron.errors import RunStopped
from proma_megatron.files import write_synced
from proma_megatron.processes.failures import LAUNCHED

if TYPE_CHECKING:
    from proma_megatron.distributed.topology import Topology

_STARTED = "PROMA_STARTED"  # in the environment of ranks: the launcher's clock when it started
_LOADED = time.monotonic()  # near enough the start of a process
_ASKING = {signal.SIGTERM, signal.SIGUSR1}
_TIME_LIMIT = 1000  # among numbers of signals


@contextmanager
def unasked_children() -> Iterator[None]:
    """Keep the signals by which ranks are asked to stop from processes started within the block.

    Slurm sends those to every process of a job, and a rank that loses its helpers fails before it
    has stopped. The rank gets what comes in between at the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ASKING)  # children inherit the mask
    try:
        # Else it starts with whoever needs it first. It leaves SIGTERM unblocked behind itself.
        with _silent_cleanup():
            resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _ASKING)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _silent_cleanup() -> Iterator[None]:
    """Let a resource tracker that is started within the block clean up without a warning.

    A rank that failed ends at once and leaves its semaphores to the tracker. What that says of them
    would stand beside the error, or below it, where the one sentence is looked for.
    """
    options = sys.warnoptions  # which multiprocessing hands to what it starts
    options.append("ignore:resource_tracker:UserWarning")
    try:
        yield
    finally:
        options.pop()


class StopSignals:
    """Signals that are noted, within the ``with`` block, instead of ending this process.

    SIGUSR1, and the first SIGINT; a second one ends the process at once. SIGTERM too, unless our
    launcher started this rank: it passes a SIGTERM of its own on as SIGUSR1, and torch elastic ends
    the peers of a dead rank by SIGTERM, for which they must not wait.

    Outside the main thread, where Python takes no handlers, and outside the block nothing is noted.
    """

    def __init__(self) -> None:
        self.reason: str | None = None  # the first signal that asked, "SIGUSR1"
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            with unasked_children():
                pass  # the resource tracker is one
            for number in self._handled():
                self._before[number] = signal.signal(number, self._note)
                # System calls of libraries that know nothing of this go on where they were.
                signal.siginterrupt(number, False)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: one that was not set from Python, which can't be set from it either.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    @staticmethod
    def _handled() -> tuple[signal.Signals, ...]:
        own = () if LAUNCHED in os.environ else (signal.SIGTERM,)
        return signal.SIGUSR1, signal.SIGINT, *own

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name
        if number == signal.SIGINT:
            # The kernel's own action needs no Python: a rank may hang in a collective.
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_run_clock() -> None:
    """Begin, in the launcher, the minutes of the ranks that it will start."""
    os.environ[_STARTED] = str(time.monotonic())


def run_clock_start() -> float:
    """Return when this rank's minutes began: with our launcher, else with its own process."""
    return float(os.environ.get(_STARTED, _LOADED) if LAUNCHED in os.environ else _LOADED)


class StopAgreement:
    """The ranks' common answer to whether the run should stop now.

    The time limit is by rank 0's clock alone: the run stops before a step that, if it and a save
    took as long as the longest of their kind so far, would end too late. Within a step it stops
    when only a save still fits.
    """

    def __init__(
        self,
        topology: Topology,
        signals: StopSignals,
        max_minutes: float | None,
        started: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Listen to what may stop a run.

        Args:
            max_minutes: the limit; None: none.
            started: when it began to run, on ``clock``; `run_clock_start`.
        """
        self._topology, self._signals = topology, signals
        self._max_minutes, self._started, self._clock = max_minutes, started, clock
        self._longest_step = self._longest_save = 0.0
        self._step_began: float | None = None
        self._agreed: str | None = None
        self._was_late = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Learn how long a step, of the warm start or of RL, takes."""
        self._step_began = began = self._clock()
        try:
            yield
        finally:
            self._step_began = None
        self._longest_step = max(self._longest_step, self._clock() - began)

    def note_save(self, seconds: float) -> None:
        """Learn how long a save takes, to its marker."""
        self._longest_save = max(self._longest_save, seconds)

    def time_left(self) -> float:
        """Return seconds to the limit by this rank's clock: infinite if none, negative after it."""
        if self._max_minutes is None:
            return math.inf
        return 60 * self._max_minutes - (self._clock() - self._started)

    def agreed(self) -> str | None:
        """Return why all ranks stop here, or None: go on.

        A collective of all ranks. Once they have agreed it stays so, without communication.
        """
        if self._agreed is None:
            self._agreed = self._reason(
                self._largest(self._code(), None, self._topology.world_size)
            )
        return self._agreed

    def agreed_within_replica(self) -> str | None:
        """Return the same for the ranks of one copy of the policy, and for this moment only.

        For what the copies do each by themselves: another one may go on. Only the copy that rank 0
        belongs to knows about the time limit.
        """
        model = self._topology.model
        return self._reason(self._largest(self._code(), model.group, model.size))

    def _code(self) -> int:
        """Return what this rank has to say; 0: go on."""
        if self._signals.reason is not None:
            return int(signal.Signals[self._signals.reason])
        return _TIME_LIMIT if self._topology.is_main and self._late() else 0

    def _late(self) -> bool:
        self._was_late = self._was_late or self._is_late()
        return self._was_late  # a clock that is read again must not take it back

    def _is_late(self) -> bool:
        # Of a step that has begun, what is left of the longest; of the next one, all of it.
        spent = 0.0 if self._step_began is None else self._clock() - self._step_began
        return max(0.0, self._longest_step - spent) + self._longest_save > self.time_left()

    def _largest(self, code: int, group: Any, size: int) -> int:
        if size == 1:
            return code
        import torch
        import torch.distributed as dist

        word = torch.tensor(code, dtype=torch.int64, device=self._topology.device)
        dist.all_reduce(word, dist.ReduceOp.MAX, group=group)
        return int(word.item())

    def _reason(self, code: int) -> str | None:
        if not code:
            return None
        if code == _TIME_LIMIT:
            return f"trainer.max_minutes={self._max_minutes:g}"
        return signal.Signals(code).name


def write_stop(stop: RunStopped, logs: Path) -> None:
    """Leave ``stopped.json`` for the launcher, and for whoever starts the run again."""
    saved = None if stop.checkpoint is None else str(stop.checkpoint)
    record = {"reason": stop.reason, "step": stop.step, "checkpoint": saved}
    write_synced(logs / STOPPED_FILE, json.dumps(record) + "\n")


def read_stop(logs: Path) -> RunStopped | None:
    """Return what a run that was stopped left behind, if it was."""
    path = logs / STOPPED_FILE
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    saved = record["checkpoint"]
    return RunStopped(record["reason"], record["step"], None if saved is None else Path(saved))
