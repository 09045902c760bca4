"""A reward function as a run uses it: called, checked, with the penalty on overlong answers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from proma_megatron.config.rollout import RewardConfig
from proma_megatron.rewards.faults import shortened, summary
from proma_megatron.rewards.registry import BUILT_IN, RewardFunction, load_reward


@dataclass(frozen=True)
class Verdict:
    """What a reward function said of one completion."""

    score: float = 0.0
    in_form: bool = False
    fault: str = ""  # why there is no score, as in "raised KeyError: 'x'"


@dataclass(frozen=True)
class Judge:
    """A reward function, and the form that it wants an answer in."""

    reward: RewardFunction
    in_form: Callable[[str], bool]

    def __call__(self, prompt: str, completion: str, reference: str) -> Verdict:
        """Judge, and never raise: an exception of a user's may not survive between processes."""
        try:
            value = self.reward(prompt, completion, reference)
            number = float(value) if isinstance(value, Real) else math.nan
            if not math.isfinite(number):
                return Verdict(fault=shortened(f"returned {value!r}"))
            return Verdict(number, self.in_form(completion))
        except BaseException as error:  # user code may raise anything, SystemExit too
            return Verdict(fault=f"raised {summary(error)}")


def load_judge(function: str, pattern: str | None) -> Judge:
    """Load the judge of ``reward.function`` and ``reward.format_pattern``.

    A completion is in the form that a pattern describes if it matches anywhere in it; "." stands
    for line breaks, too, since reasoning has several lines. Without a pattern the form is the
    function's own: a number after "####", or something in a box. A user's function has none.

    Raises:
        ConfigError: see `load_reward`.
    """
    reward = load_reward(function)
    if pattern is not None:
        form = re.compile(pattern, re.DOTALL)
        return Judge(reward, lambda completion: form.search(completion) is not None)
    if function in BUILT_IN:
        return Judge(reward, BUILT_IN[function].in_form)
    return Judge(reward, lambda completion: False)


def overlong_penalty(length: int, finished: bool, config: RewardConfig, limit: int) -> float:
    """Return what a completion of ``length`` tokens loses, ``limit`` being the most it may have.

    It grows linearly over the last ``overlong_buffer`` tokens before the limit (DAPO, arXiv
    2503.14476, eq. 13, with the penalty as a factor), or is all or nothing without a buffer. A
    completion that did not finish loses all of it.
    """
    if not finished:
        return config.overlong_penalty
    if config.overlong_buffer == 0:
        return 0.0
    beyond = length - (limit - config.overlong_buffer)
    return config.overlong_penalty * min(max(beyond / config.overlong_buffer, 0.0), 1.0)
