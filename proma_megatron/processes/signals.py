"""A request to stop, on its way from the launcher to its ranks, which save and leave.

SIGTERM, SIGUSR1 and Ctrl-C all reach the ranks as SIGUSR1: torch elastic gives each rank a session
of its own, so that a terminal's Ctrl-C reaches the launcher alone, and ends by SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any, Self

import psutil

_LOOK_SECONDS = 0.1  # how often to see whether a rank can be told


class Forwarder:
    """Handlers that pass signals on within the ``with`` block; a second Ctrl-C ends the process.

    Outside the main thread, where Python takes no handlers, nothing is.
    """

    def __init__(self) -> None:
        self.request: str | None = None  # the first signal that asked, "SIGTERM"
        self._interrupts = 0
        self._before: dict[int, Any] = {}
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
            threading.Thread(target=self._tell, name="forwarder", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.request = self.request or signal.Signals(number).name
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            from torch.distributed.elastic.multiprocessing import SignalException

            # Elastic passes its signal on, and SIGTERM is what ends a rank at once.
            raise SignalException("interrupted twice", signal.SIGTERM)

    def _tell(self) -> None:
        """Tell every rank once, as soon as it listens: before, the signal would end it."""
        told: set[int] = set()
        while not self._closed.wait(_LOOK_SECONDS):
            if self.request is None:
                continue
            for pid in _ranks():
                if pid not in told and _catches(pid, signal.SIGUSR1):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGUSR1)
                    told.add(pid)


def _ranks() -> list[int]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "proma_megatron.processes.entry" in child.cmdline():
                found.append(child.pid)
    return found


def _catches(pid: int, number: int) -> bool:
    """Tell whether the process handles this signal."""
    try:
        with open(f"/proc/{pid}/status") as status:  # noqa: PTH123
            caught = next(line for line in status if line.startswith("SigCgt:"))
    except (OSError, StopIteration):
        return False
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
