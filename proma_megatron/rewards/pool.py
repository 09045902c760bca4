"""Scores rollouts in a pool of processes, so that no sample can take longer than its limit.

A sample whose limit runs out loses its process, and scores 0; the others don't notice. Processes
come from multiprocessing's fork server, a bare interpreter that the trainer starts: the trainer
itself, with its CUDA context and Gloo's threads, can't be forked, and a process that is spawned
anew would import math-verify for seconds. What this module imports, those processes import, and so
they do the trainer's main module (`startup` or `cli`): none of these may load torch.

- A limit runs from the moment that a process takes a sample, after everything has been imported.
- The processes end with `Scorer.close`, and when the trainer is gone, however it ended.
- What a reward function prints goes to stderr.
"""

from __future__ import annotations

import fcntl
import functools
import multiprocessing as mp
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from multiprocessing import forkserver
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pebble import CONSTS, ProcessExpired, ProcessFuture, ProcessPool

from proma_megatron.config.choices import REWARDS, RewardFacts
from proma_megatron.config.rollout import RewardConfig
from proma_megatron.errors import ConfigError, RewardError
from proma_megatron.processes.stopping import unasked_children
from proma_megatron.processes.watchdog import write_stacks_when_asked
from proma_megatron.rewards.judge import Judge, Verdict, load_judge, overlong_penalty
from proma_megatron.rewards.registry import BUILT_IN

if TYPE_CHECKING:
    from proma_megatron.types import Rollout, ScoredRollout

# pebble ends a process by SIGTERM and, so many seconds later, by SIGKILL. The first is for ranks,
# see `unasked_children`.
CONSTS.term_timeout = 0.05
_LOOK_SECONDS = 1.0  # how often to see whether the pool is still there


class Scorer:
    """Gives rollouts their rewards; the processes start with the first that need them.

    A quick function with its own form of an answer takes time in proportion to the text,
    microseconds, and scores right here.
    """

    def __init__(self, config: RewardConfig, max_new_tokens: int) -> None:
        """Begin without processes.

        Args:
            max_new_tokens: the length limit of completions, where the overlong penalty is full.
        """
        self._config = config
        # Of a user's function nothing is known.
        self._facts = REWARDS.get(config.function, RewardFacts())
        self._limit = max_new_tokens
        self._pool: ProcessPool | None = None

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Score each rollout, in the same order.

        A reward is the score, and the format bonus if the completion is in the form asked for, less
        the overlong penalty. A sample that runs out of time has score 0 and no bonus. Samples that
        do so keep a process busy for ``timeout_seconds`` each.

        Raises:
            RewardError: the function raised, gave no finite number, or ended its process other
                than with exit code 0 (which is taken for a sample that doesn't come back); the
                message names the sample. The processes are stopped, and start again when needed.
        """
        from proma_megatron.types import ScoredRollout  # loads torch

        if self._facts.quick and self._config.format_pattern is None:
            verdicts = self._judge_here(rollouts)
        else:
            verdicts = self._judge_in_pool(rollouts)
        scored = []
        for rollout, verdict in zip(rollouts, verdicts, strict=True):
            if verdict is not None and verdict.fault:
                self.close()
                raise RewardError(
                    f"the reward function {verdict.fault} on {_place(rollout)}, expected a finite "
                    "number"
                )
            score = verdict.score if verdict is not None else 0.0
            scored.append(
                ScoredRollout(
                    rollout,
                    reward=score + self._added(rollout, verdict),
                    score=score,
                    timed_out=verdict is None,
                )
            )
        return scored

    def close(self) -> None:
        """End the processes, whatever they are at."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _added(self, rollout: Rollout, verdict: Verdict | None) -> float:
        """Return bonus less penalty."""
        bonus = self._config.format_bonus if verdict is not None and verdict.in_form else 0.0
        length = len(rollout.tokens)
        return bonus - overlong_penalty(length, rollout.finished, self._config, self._limit)

    def _judge_here(self, rollouts: Sequence[Rollout]) -> list[Verdict | None]:
        judge = load_judge(self._config.function, self._config.format_pattern)
        return [judge(*_texts(rollout)) for rollout in rollouts]

    def _judge_in_pool(self, rollouts: Sequence[Rollout]) -> list[Verdict | None]:
        """Return the verdict on each rollout, None where it did not come in time."""
        if not rollouts:
            return []
        config = self._config
        try:
            pool = self._running_pool()
            # One task a sample, for limits are a task's; it costs less than 0.1 ms.
            futures = [
                pool.schedule(
                    _judge,
                    (config.function, config.format_pattern, *_texts(rollout)),
                    timeout=config.timeout_seconds,
                )
                for rollout in rollouts
            ]
            return [
                _verdict(pool, future, rollout)
                for rollout, future in zip(rollouts, futures, strict=True)
            ]
        except RewardError:
            self.close()
            raise
        except RuntimeError as error:  # pebble's, of a pool that has broken
            self.close()
            raise RewardError(
                "the scoring processes ended while they had no sample, expected them to stay; "
                "check that the reward function's module can be imported twice and that there is "
                "enough memory"
            ) from error

    def _running_pool(self) -> ProcessPool:
        if self._pool is not None and not self._pool.active:
            self.close()  # something ended an idle process, between two steps
        if self._pool is None:
            config = self._config
            context = mp.get_context("forkserver")
            # Of a user's module nobody knows whether it may be imported before a fork.
            own = [] if self._facts.imports is None else [self._facts.imports]
            context.set_forkserver_preload([__name__, *own])
            judge = (config.function, config.format_pattern)
            with unasked_children():
                forkserver.ensure_running()  # whose children inherit what it can be told
            self._pool = ProcessPool(
                config.workers, initializer=_enter, initargs=judge, context=context
            )
            problem = _result(self._pool, self._pool.schedule(_load, judge))
            if problem:
                raise RewardError(f"in a scoring process, {problem}")
        return self._pool


def _verdict(pool: ProcessPool, future: ProcessFuture[Verdict], rollout: Rollout) -> Verdict | None:
    """Return what the process said, or None if the sample's limit ran out."""
    try:
        return _result(pool, future)
    except TimeoutError:
        return None
    except ProcessExpired as ended:
        raise RewardError(
            f"the process that scored {_place(rollout)} ended with {_exit(ended.exitcode)}, "
            "expected a finite number; check that the reward function doesn't end or crash its "
            "process, and that there is enough memory"
        ) from ended


def _result[T](pool: ProcessPool, future: ProcessFuture[T]) -> T:
    """Wait for a result, but not for one of a pool that has broken.

    Raises:
        RuntimeError: the pool has broken.
    """
    while not future.done():
        wait([future], timeout=_LOOK_SECONDS)
        if not pool.active and not future.done():
            raise RuntimeError("the pool has broken")
    return future.result()


def _place(rollout: Rollout) -> str:
    return f"problem '{rollout.prompt.problem.id}', sample {rollout.sample}"


def _texts(rollout: Rollout) -> tuple[str, str, str]:
    return rollout.prompt.text, rollout.text, rollout.prompt.problem.answer


def _exit(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.Signals(-code).name})"


# --------------------------------------------------------------------------- in the processes


def _enter(function: str, pattern: str | None) -> None:
    """Prepare a process before it takes samples; no limit applies to this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # is for the trainer, which ends this process
    write_stacks_when_asked()
    _end_with_parent()
    os.dup2(2, 1)  # stdout may be the run's live display
    if not _load(function, pattern) and function in BUILT_IN:
        _judge(function, pattern, "", r"\boxed{1/2}", "1")  # loads what is imported at first use


def _end_with_parent() -> None:
    """Have the kernel end this process when the trainer is gone.

    An idle process finds its pipe closed. One in the middle of a sample would run on, so let the
    closing of the pipe that it was started through raise SIGIO, which nobody handles. A thread that
    waits for it would need Python's lock, which a computation may hold; and the parent of this
    process, whose end the kernel could tell by itself, is the fork server.
    """
    parent = mp.parent_process()
    assert parent is not None
    pipe = parent.sentinel
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)


_loaded: Callable[[str, str | None], Judge] = functools.cache(load_judge)


def _load(function: str, pattern: str | None) -> str:
    """Load the reward function, once a process; say what kept it from that, "" if nothing."""
    try:
        _loaded(function, pattern)
    except ConfigError as error:
        return str(error)
    return ""


def _judge(function: str, pattern: str | None, *texts: Any) -> Verdict:
    return _loaded(function, pattern)(*texts)
