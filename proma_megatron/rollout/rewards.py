"""What a completion is worth: reward functions, and the scoring of rollouts with them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import cast

from proma_megatron.config import ConfigError
from proma_megatron.records import Rollout, ScoredRollout
from proma_megatron.rollout.tasks import final_answer, parse_number

RewardFunction = Callable[[str, str, str], float]  # (prompt, completion, reference) -> reward


class RewardError(RuntimeError):
    """A reward function failed, or gave something that is no finite number."""


def gsm8k(prompt: str, completion: str, reference: str) -> float:
    """1.0 if the number after the completion's last "####" equals the reference, else 0.0.

    Numbers are compared as numbers, so 1,000 equals $1000.00.

    Raises:
        ValueError: the reference is not a number.
    """
    expected = parse_number(reference)
    if expected is None:
        raise ValueError(f"the reference is {reference!r}, expected a number")
    return 1.0 if final_answer(completion) == expected else 0.0


def load_reward(spec: str) -> RewardFunction:
    """The reward function of "gsm8k" or "package.module:function".

    Raises:
        ConfigError: the module can't be imported, or has no such function.
    """
    if spec == "gsm8k":
        return gsm8k
    key = f"reward.function is '{spec}'"
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ConfigError(f"{key}, expected 'gsm8k' or 'package.module:function'")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way while it is imported
        raise ConfigError(
            f"{key}, but module '{module_name}' can't be imported ({_summary(error)}); check the "
            "name, and that its folder is on PYTHONPATH"
        ) from error
    if not hasattr(module, name):
        raise ConfigError(f"{key}, but module '{module_name}' has no '{name}'; check the name")
    function = getattr(module, name)
    if not callable(function):
        raise ConfigError(
            f"{key}, but '{name}' is {type(function).__name__}, expected a function of "
            "(prompt, completion, reference)"
        )
    return cast(RewardFunction, function)


def score(rollouts: Sequence[Rollout], reward: RewardFunction) -> list[ScoredRollout]:
    """Each rollout with its reward, in the same order.

    Raises:
        RewardError: the function raised (the cause is attached), or gave no finite number.
    """
    return [ScoredRollout(rollout, _reward_of(rollout, reward)) for rollout in rollouts]


def _reward_of(rollout: Rollout, reward: RewardFunction) -> float:
    prompt = rollout.prompt
    where = f"problem '{prompt.problem.id}', sample {rollout.sample}"
    try:
        value = reward(prompt.text, rollout.text, prompt.problem.answer)
        number = float(value) if isinstance(value, Real) else math.nan
    except Exception as error:  # user code may raise anything
        raise RewardError(
            f"the reward function raised {_summary(error)} on {where}, expected a finite number"
        ) from error
    if not math.isfinite(number):
        raise RewardError(
            f"the reward function returned {value!r} on {where}, expected a finite number"
        )
    return number


def _summary(error: Exception) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
