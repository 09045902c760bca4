"""Runs that something happens to: what is done to a rank, and when."""

from __future__ import annotations

import importlib
import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest import mock

from proma_megatron.processes.failures import LAUNCHED
from proma_megatron.runs.directory import RunDir
from support.command import forked_proma
from support.forked import forked_start_ranks, run_main

LAYOUTS = {
    "TP2": ("parallel.tensor=2",),
    "PP2": ("parallel.pipeline=2",),
    "DP2": ("parallel.data=2",),
}

# Every kind of state matters: Adam's moments, a schedule, a running mean of weights, a KL
# coefficient that changes, a stream of demonstrations and one of prompts.
TINY: Sequence[str] = (
    "seed=3",
    "model={hidden_size: 32, ffn_hidden_size: 64, layers: 2, head_dim: 8}",
    "data={train_problems: 200, validation_problems: 4, largest_number: 9, solution_steps: 1}",
    "rollout={prompts_per_step: 4, samples_per_prompt: 2, max_new_tokens: 6}",
    "rollout.max_prompt_tokens=40",
    "batching.tokens_per_microbatch=90",
    "reward.function=support.rewards:varied",
    "optimizer={lr: 0.01, warmup_steps: 1, decay: linear}",
    "loss.kl={coefficient: 0.1, place: reward, target: 0.001}",
    "warm_start={steps: 2, sequences_per_step: 4, lr: 0.005}",
    "trainer={steps: 3, eval_every: 2, save_every: 1, kl_step_every: 1, kl_lagged_every: 1}",
    "trainer.lag_steps=2",
    "trainer.keep_last=2",
)

# What a drill can be in besides the phases of the run: a function, by its module. They run on every
# rank, those of MAIN on rank 0 alone.
MOMENTS = {
    "write": "proma_megatron.checkpoints.saving:_write",  # of a checkpoint's files, in a thread
    "index": "proma_megatron.checkpoints.saving:sync_folder",  # files are there, no marker yet
    "marker": "proma_megatron.checkpoints.saving:write_marker",
    "links": "proma_megatron.checkpoints.saving:point",  # complete, and retention has removed
    "removal": "proma_megatron.checkpoints.saving:remove",
    "report": "proma_megatron.observability.metrics:append_row",
}
MAIN = ("index", "marker", "links", "removal", "report")


def send(number: signal.Signals) -> None:
    """A signal to the rank's process."""
    os.kill(os.getpid(), number)


KILL = partial(send, signal.SIGKILL)


@dataclass(frozen=True)
class Fault:
    """Something that is done in one rank while it is in a phase."""

    phase: str
    rank: int = 0
    time: int = 1  # that this process enters the phase
    delay: float = 0.0  # seconds after it has been entered; where it is over by then, at its end
    action: Callable[[], object] = KILL

    def __str__(self) -> str:
        return f"{self.phase} {self.time}, rank {self.rank}, after {self.delay:.4f} s"


# --------------------------------------------------------------------------- in a rank


class _Watch:
    """Knows which phases this rank enters, and does what is due there."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._faults = faults
        self._times: dict[str, int] = {}

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        time = self._times[name] = self._times.get(name, 0) + 1
        due = [_Once(f) for f in self._faults if (f.phase, f.time) == (name, time)]
        for once in due:
            once.start()
        try:
            yield
        finally:
            for once in due:
                once.now()


class _Once:
    """Does it when the time has come, or when told to; not twice."""

    def __init__(self, fault: Fault) -> None:
        self._fault, self._lock, self._done = fault, threading.Lock(), False
        self._timer = threading.Timer(fault.delay, self.now)
        self._timer.daemon = True

    def start(self) -> None:
        if self._fault.delay:
            self._timer.start()
        else:
            self.now()

    def now(self) -> None:
        with self._lock:
            if not self._done:
                self._done = True
                self._fault.action()


def drilled_main(
    faults: Sequence[Fault], options: frozenset[str], module: str, arguments: Sequence[str]
) -> None:
    """What a rank runs.

    Args:
        options: "scoring": rewards in processes of their own; "torchrun": as if it had started us.
    """
    from proma_megatron.processes.watchdog import Phases
    from proma_megatron.rewards.pool import Scorer

    if "torchrun" in options:
        del os.environ[LAUNCHED]
    rank = int(os.environ["RANK"])
    watch = _Watch([fault for fault in faults if fault.rank == rank])
    phase = Phases.phase

    @contextmanager
    def watched(self: Phases, name: str) -> Iterator[None]:
        with phase(self, name), watch.within(name):
            yield

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(Phases, "phase", watched))
        if "scoring" not in options:  # processes that take half a second to start
            here = mock.patch.object(Scorer, "_judge_in_pool", Scorer._judge_here)
            patches.enter_context(here)
        for name, place in MOMENTS.items():
            patches.enter_context(_watched_function(watch, name, place))
        run_main(module, arguments)


def _watched_function(watch: _Watch, name: str, place: str) -> Any:
    owner, _, function = place.partition(":")
    target = f"{owner}.{function}"
    original: Callable[..., Any] = getattr(importlib.import_module(owner), function)

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        with watch.within(name):
            return original(*args, **kwargs)

    return mock.patch(target, call)


# --------------------------------------------------------------------------- in the test


@dataclass(frozen=True)
class Drill:
    """A run in a folder of its own, which is started and gone on with by the same command."""

    folder: Path
    overrides: tuple[str, ...]
    options: frozenset[str] = frozenset()

    @property
    def run_dir(self) -> RunDir:
        return RunDir(self.folder / "runs" / "run")

    def go(
        self, *faults: Fault, overrides: Sequence[str] = (), flag: str = "--resume-or-start"
    ) -> subprocess.CompletedProcess[str]:
        """`proma train` to its end, or until the faults end it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "config.yaml"
        config.write_text("name: run\n")
        start = partial(forked_start_ranks, main=partial(drilled_main, faults, self.options))
        return forked_proma(
            "train", str(config), flag, *self.overrides, *overrides, cwd=self.folder, start=start
        )

    def finish(self, overrides: Sequence[str] = ()) -> None:
        """Go on to the end."""
        done = self.go(overrides=overrides)
        assert done.returncode == 0, done.stderr


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The last line that a command left on stderr."""
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else ""


class Dice:
    """Chance that can be had again: PROMA_FAULT_SEED is the seed that a test printed."""

    def __init__(self) -> None:
        self.seed = int(os.environ.get("PROMA_FAULT_SEED") or random.SystemRandom().getrandbits(32))
        print(f"PROMA_FAULT_SEED={self.seed}")  # pytest shows it where the test fails
        self._random = random.Random(self.seed)

    def rank(self, phase: str, world_size: int = 2) -> int:
        return 0 if phase in MAIN else self._random.randrange(world_size)

    def delay(self, longest: float = 0.2) -> float:
        """Seconds; short ones as likely as long ones."""
        return longest * self._random.random() ** 2
