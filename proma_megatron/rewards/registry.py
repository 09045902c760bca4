"""What a completion is worth: reward functions, the form of an answer, and the price of length.

`scoring` runs these in processes of their own, which have to start quickly: nothing here may load
torch, and math-verify, which takes seconds to import, is loaded by the first answer it compares.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from proma_megatron.config.choices import expected_reward
from proma_megatron.config.rollout import RewardConfig
from proma_megatron.data.answers import final_answer, parse_number
from proma_megatron.errors import ConfigError
from proma_megatron.rewards.faults import summary
from proma_megatron.rewards.gsm8k import gsm8k
from proma_megatron.rewards.math_verify import (
    holds_answer,
    last_box,
    math_answer,
    stated_reference,
)

if TYPE_CHECKING:  # it loads torch
    from proma_megatron.types import Prompt

RewardFunction = Callable[[str, str, str], float]  # (prompt, completion, reference) -> score


@dataclass(frozen=True)
class BuiltIn:
    """A reward function of our own, and what we know about it."""

    reward: RewardFunction
    in_form: Callable[[str], bool]  # whether a completion states an answer as it should
    takes: Callable[[str], bool]  # whether a text can be a reference, as far as is cheap to tell
    expects: str  # of a reference


# With the keys of `choices.REWARDS`.
BUILT_IN = {
    "gsm8k": BuiltIn(
        gsm8k,
        lambda completion: final_answer(completion) is not None,
        lambda reference: parse_number(reference) is not None,
        "a number",
    ),
    "math": BuiltIn(
        math_answer,
        lambda completion: bool((last_box(completion) or "").strip()),
        lambda reference: bool(stated_reference(reference).strip("$ \t\r\n")),
        "an answer in text or LaTeX",
    ),
}


def load_reward(spec: str) -> RewardFunction:
    """Load the reward function of "gsm8k", "math" or "package.module:function".

    Raises:
        ConfigError: the module can't be imported, or has no such function.
    """
    if spec in BUILT_IN:
        return BUILT_IN[spec].reward
    key = f"reward.function is '{spec}'"
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ConfigError(f"{key}, expected {expected_reward()}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way while it is imported
        raise ConfigError(
            f"{key}, but module '{module_name}' can't be imported ({summary(error)}); check the "
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


def check_reward(config: RewardConfig, max_new_tokens: int) -> None:
    """Check that rollouts of this length can be scored like this, before any work starts.

    Raises:
        ConfigError: the function can't be loaded, a bonus is for a form that nothing describes, or
            the penalty's buffer is longer than a completion.
    """
    load_reward(config.function)
    if config.format_bonus > 0 and config.function not in BUILT_IN and not config.format_pattern:
        raise ConfigError(
            f"reward.format_bonus is {config.format_bonus} with "
            f"reward.function='{config.function}', whose form of an answer is not known; set "
            "reward.format_pattern to a regular expression, or the bonus to 0"
        )
    if config.overlong_buffer > max_new_tokens:
        raise ConfigError(
            f"reward.overlong_buffer is {config.overlong_buffer}, expected at most "
            f"rollout.max_new_tokens={max_new_tokens}; lower it"
        )


def check_reference(function: str, reference: str) -> str | None:
    """Say what the reward function can't take about a reference, to end a sentence; None if it can.

    Of a user's function nothing is known, so it takes any.
    """
    built_in = BUILT_IN.get(function)
    if built_in is None or built_in.takes(reference):
        return None
    return f"expected {built_in.expects}, which reward.function='{function}' compares with"


def check_references(function: str, prompts: Iterable[Prompt]) -> None:
    """Check that the reward function can use every reference.

    math-verify, if it scores, parses all of them, so this runs once a run and not on every rank.

    Raises:
        ConfigError: it can't use one.
    """
    problems = [prompt.problem for prompt in prompts]
    for problem in problems:
        fault = check_reference(function, problem.answer)
        if fault is not None:
            raise ConfigError(
                f"problem '{problem.id}' has the reference {problem.answer!r}, {fault}"
            )
    for problem in problems if function == "math" else ():
        if not holds_answer(problem.answer):
            raise ConfigError(
                f"problem '{problem.id}' has the reference {problem.answer!r}, in which "
                "math-verify finds no answer; mend the reference or remove the problem"
            )
