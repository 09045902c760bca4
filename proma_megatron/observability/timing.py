"""Seconds that the phases of a run take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class Stopwatch:
    """Seconds spent in named phases.

    Phases nest; an outer phase includes its inner ones, and a phase inside itself counts once.
    CUDA kernels run asynchronously: a phase that ends without a synchronization leaves its tail to
    the next one.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        watch: Callable[[str], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Start with no phase.

        Args:
            watch: what else to enter for a phase, by its name.
        """
        self._clock = clock
        self._watch = watch
        self._seconds: dict[str, float] = {}
        self._running: set[str] = set()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of the ``with`` block, also when it raises."""
        if name in self._running:
            yield
            return
        self._running.add(name)
        start = self._clock()
        try:
            with self._watch(name):
                yield
        finally:
            self._running.remove(name)
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    def seconds(self) -> dict[str, float]:
        """Return ``{"seconds/<phase>": seconds}`` of the phases that ended since the last call."""
        result = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds = {}
        return result
