"""Where the time of a run goes, for `trainer.profile`: seconds by phase, and a trace of one step.

``logs/profile.txt`` has the seconds of each phase, of what is inside it, and tokens a second;
``logs/trace_step_000002.json.gz`` is a torch profiler trace in Chrome's format, for
chrome://tracing or ui.perfetto.dev. Both are of rank 0.

Nothing that is measured changes what is computed. With the profile off, a step enters a few null
contexts, and Megatron's schedules get no timers.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, record_function

from proma_megatron.files import atomic_write, disk_errors

TRACED = 2  # which RL step of a process is traced: the first one pays for what is done once
OPERATORS = 15  # in the table
SMALLEST = 0.005  # share of a step below which time between inner phases is not listed

Place = tuple[str, ...]  # names of the phases that are open, outermost first

# Megatron's names of what its schedules time, and ours.
_MEGATRON_TIMERS = {
    "forward-compute": "forward",
    "backward-compute": "backward",
    "all-grads-sync": "reduce",
}
_PROJECTION_NOTE = "projection: with the weight gradients, which the accumulator computes, too"


class Profiler(Protocol):
    """What a run tells of itself while it goes on."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Enter this phase of the run for the ``with`` block."""
        ...

    def step(self, step: int, *, last: bool) -> AbstractContextManager[None]:
        """Enter this RL step, and what follows it, for the ``with`` block."""
        ...

    def count(self, name: str, tokens: int) -> None:
        """Count so many tokens, of all replicas, that the phase of this name has processed."""
        ...

    def observe(self, config: Any, accumulator: Any | None) -> None:
        """Look into passes of a policy with this Megatron config and this accumulator."""
        ...

    def finish(self) -> str | None:
        """Write the table, and give it for the user; None if there is nothing to tell."""
        ...


class NullProfiler:
    """The profiler of a run that asked for none, and of every rank but the first."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def step(self, step: int, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def count(self, name: str, tokens: int) -> None:
        pass

    def observe(self, config: Any, accumulator: Any | None) -> None:
        pass

    def finish(self) -> str | None:
        return None


@dataclass
class Spent:
    """Seconds by phase, and tokens by the name of a phase."""

    seconds: dict[Place, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, other: Spent) -> None:
        for place, seconds in other.seconds.items():
            self.seconds[place] = self.seconds.get(place, 0.0) + seconds
        for name, tokens in other.tokens.items():
            self.tokens[name] = self.tokens.get(name, 0) + tokens


@dataclass(frozen=True)
class Operator:
    """All calls of one operator in the traced step; seconds without those of what it calls."""

    name: str
    calls: int
    seconds: float


class StepProfiler:
    """Times of the phases on this rank, and a trace of one step."""

    def __init__(
        self,
        logs: Path,
        title: str,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Begin a profile.

        Args:
            logs: the folder that both files are written to, which is there.
            title: of the table.
        """
        self._logs, self._title, self._device, self._clock = logs, title, device, clock
        # Kineto tells errors of its own, such as the lack of a GPU. It reads this when it starts.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._open: Place = ()
        self._before = Spent()  # and between RL steps
        self._steps: list[tuple[int, Spent]] = []
        self._traced: tuple[int, Spent, list[Operator]] | None = None
        self._spent = self._before
        self._tracing = False
        self._accumulator: Any | None = None

    # ------------------------------------------------------------------ measuring

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._wait()
        with self._range(name):
            try:
                yield
            finally:
                self._wait()

    @contextmanager
    def _range(self, name: str) -> Iterator[None]:
        before, start = self._open, self._clock()
        self._open = place = (*before, name)
        try:
            with record_function(name) if self._tracing else nullcontext():
                yield
        finally:
            self._open = before
            seconds = self._spent.seconds
            seconds[place] = seconds.get(place, 0.0) + self._clock() - start

    def _wait(self) -> None:
        """Wait for the kernels that were launched: they belong to the phase that launched them."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def count(self, name: str, tokens: int) -> None:
        self._spent.tokens[name] = self._spent.tokens.get(name, 0) + tokens

    @contextmanager
    def step(self, step: int, *, last: bool) -> Iterator[None]:
        self._spent = Spent()
        trace = self._traced is None and (last or len(self._steps) + 1 == TRACED)
        try:
            if not trace:
                with self._range("whole"):
                    yield
                self._steps.append((step, self._spent))
                return
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._tracing = True
            with torch.profiler.profile(activities=activities) as found, self._range("whole"):
                yield
            self._traced = (step, self._spent, list(_operators(found, self._device)))
            self._write_trace(found, step)
        finally:
            self._spent, self._tracing = self._before, False

    def observe(self, config: Any, accumulator: Any | None) -> None:
        # Megatron's schedules ask for timers and do without where there are none.
        config.timers = _Timers(self)
        self._accumulator = accumulator
        if accumulator is not None:
            # A wait for the device in each layer would be what is measured.
            accumulator.watch = self._range

    # ------------------------------------------------------------------ telling

    def _write_trace(self, found: Any, step: int) -> None:
        path = self._logs / f"trace_step_{step:06d}.json.gz"
        with (
            disk_errors(path),
            tempfile.TemporaryDirectory(dir=self._logs) as folder,
            atomic_write(path) as part,
        ):
            plain = Path(folder) / "trace.json"
            found.export_chrome_trace(str(plain))
            with plain.open("rb") as source, gzip.open(part, "wb") as target:
                shutil.copyfileobj(source, target)

    def finish(self) -> str | None:
        parts = [self._title]
        if self._before.seconds:
            parts += ["before RL and after it", *table(self._before, 1)]
        steps = [(step, spent) for step, spent in self._steps if self._counts(step)]
        if steps:
            whole = Spent()
            for _, spent in steps:
                whole.add(spent)
            first, last = steps[0][0], steps[-1][0]
            numbers = f"step {first}" if first == last else f"steps {first} to {last}"
            parts += ["", f"RL {numbers}, means of a step", *table(whole, len(steps))]
        if self._traced is not None:
            step, spent, operators = self._traced
            parts += ["", f"RL step {step}, slowed down by its trace", *table(spent, 1)]
            parts += ["", *_operator_table(operators)]
        if len(parts) == 1:
            return None
        if any(" projection " in line for line in parts):
            parts += ["", _PROJECTION_NOTE]
        if self._accumulator is not None and self._accumulator.choices:
            found = self._accumulator.describe_choices()
            parts += ["", "sequence gradients of weights, in the last microbatch", *found]
        text = "\n".join(parts)
        path = self._logs / "profile.txt"
        with disk_errors(path), atomic_write(path) as part:
            part.write_text(text + "\n", encoding="utf-8")
        return f"{text}\n\nthe profile is in {self._logs}"

    def _counts(self, step: int) -> bool:
        """Tell whether a step is like most: not the first of this process, if there are others."""
        return step != self._steps[0][0] or len(self._steps) == 1


class _Timers:
    """A stand-in for Megatron's timers, which opens a phase for those that it knows."""

    def __init__(self, profile: StepProfiler) -> None:
        self._timers = {theirs: _Timer(profile, ours) for theirs, ours in _MEGATRON_TIMERS.items()}
        self._other = _Timer(profile, None)

    def __call__(self, name: str, log_level: int = 0) -> _Timer:
        return self._timers.get(name, self._other)


class _Timer:
    def __init__(self, profile: StepProfiler, name: str | None) -> None:
        self._profile, self._name = profile, name
        self._phase: AbstractContextManager[None] | None = None

    def start(self, barrier: bool = False) -> None:
        if self._name is not None:
            self._phase = self._profile.phase(self._name)
            self._phase.__enter__()

    def stop(self, barrier: bool = False) -> None:
        if self._phase is not None:
            self._phase.__exit__(None, None, None)
            self._phase = None


# --------------------------------------------------------------------------- tables


def table(spent: Spent, steps: int) -> list[str]:
    """Return lines: phases as they lie in each other, seconds of a step, shares, tokens a second.

    What a phase spends outside of its inner ones is listed below them as "other". Shares are of
    everything.
    """
    whole = sum(s for place, s in spent.seconds.items() if len(place) == 1)
    lines = [f"{'phase':<28}{'seconds':>9}{'share':>8}{'tokens/s':>10}"]

    def row(depth: int, name: str, seconds: float) -> None:
        label = "  " * depth + name
        tokens = spent.tokens.get(name)
        rate = f"{tokens / seconds:>10,.0f}" if tokens and seconds else ""
        share = seconds / whole if whole else 0.0
        lines.append(f"{label:<28}{seconds / steps:>9.3f}{share:>8.1%}{rate}")

    def children(place: Place) -> None:
        inner = {p: s for p, s in spent.seconds.items() if p[:-1] == place}
        for at, seconds in sorted(inner.items(), key=lambda item: -item[1]):
            row(len(place), at[-1], seconds)
            children(at)
        rest = spent.seconds[place] - sum(inner.values()) if place and inner else 0.0
        if whole and rest / whole >= SMALLEST:
            row(len(place), "other", rest)

    children(())
    return lines


def _operators(found: Any, device: torch.device) -> Iterable[Operator]:
    """Yield what took longest in a trace, the slowest first."""
    on_device = device.type == "cuda"
    events = [event for event in found.key_averages() if not event.is_user_annotation]
    times = [
        event.self_device_time_total if on_device else event.self_cpu_time_total for event in events
    ]
    for event, microseconds in sorted(zip(events, times, strict=True), key=lambda pair: -pair[1]):
        yield Operator(event.key, event.count, microseconds / 1e6)


def _operator_table(operators: list[Operator]) -> list[str]:
    whole = sum(operator.seconds for operator in operators)
    lines = [f"{'operator':<44}{'calls':>8}{'seconds':>9}{'share':>8}"]
    lines += [
        f"{o.name[:43]:<44}{o.calls:>8}{o.seconds:>9.3f}{o.seconds / whole if whole else 0:>8.1%}"
        for o in operators[:OPERATORS]
    ]
    return lines
