"""What a completion is worth: reward functions, the form of an answer, and the price of length.

`scoring` runs these in processes of their own, which have to start quickly: nothing here may load
torch, and math-verify, which takes seconds to import, is loaded by the first answer it compares.
"""

from __future__ import annotations

import importlib
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, cast

from proma_megatron.config.sections import ConfigError, RewardConfig
from proma_megatron.data.answers import final_answer, parse_number
from proma_megatron.errors import RunError

RewardFunction = Callable[[str, str, str], float]  # (prompt, completion, reference) -> score

_EXPECTED = "expected 'gsm8k', 'math' or 'package.module:function'"
_LONGEST_FAULT = 500  # characters of what a user's function said, in an error message


class RewardError(RunError):
    """A reward function failed, or gave something that is no finite number."""


# --------------------------------------------------------------------------- gsm8k


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


# --------------------------------------------------------------------------- math


def math_answer(prompt: str, completion: str, reference: str) -> float:
    """1.0 if math-verify finds the completion's answer equal to the reference, else 0.0.

    The answer is what stands in the last complete "\\boxed{...}"; without one, what math-verify
    takes for the answer in the text. The reference is LaTeX, with or without a box or dollars, or
    plain text such as "3,000" or "1/2".

    There are expressions that this doesn't come back from; `scoring.Scorer` sets the limit.

    Raises:
        ValueError: the reference holds no answer.
    """
    expected = _parsed(_stated_reference(reference))
    if not expected:
        raise ValueError(f"the reference is {reference!r}, expected an answer in text or LaTeX")
    # The order matters: math-verify lets an answer x = 3 stand for 3 according to which is which.
    return (
        1.0 if _math_verify().verify(expected, _answer(completion), timeout_seconds=None) else 0.0
    )


def holds_answer(reference: str) -> bool:
    """Whether math-verify finds an answer in a reference; parsing is all that it does here."""
    return bool(_parsed(_stated_reference(reference)))


def last_box(text: str) -> str | None:
    """What stands in the last "\\boxed{...}" of the text that is closed, or None.

    One pass over the text, whatever its braces. Of a box within a box it is the outer one.
    """
    found = None
    open_braces: list[int | None] = []  # where the content of a box begins; None for other braces
    for token in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if token[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None:
                found = text[start : token.start()]
        elif token[0].endswith("{") and token[0] != r"\{":
            open_braces.append(None if token[0] == "{" else token.end())
    return found


def _answer(completion: str) -> list[Any]:
    """The completion's answer as math-verify has it: no element, or its value and its text."""
    # math-verify itself would make one set of all boxes, and a model that corrects itself be wrong.
    box = last_box(completion)
    return _parsed(completion if box is None else f"${box}$")


def _stated_reference(reference: str) -> str:
    """The reference as LaTeX that math-verify finds: of bare LaTeX it sees at most the numbers."""
    box = last_box(reference)
    if box is not None:
        return f"${box}$"
    delimited = len(re.findall(r"(?<!\\)\$", reference)) >= 2 or re.search(r"\\[(\[]", reference)
    return reference if delimited else f"${reference}$"


def _parsed(text: str) -> list[Any]:
    # No limits of math-verify's own here, nor in `verify`: they are alarms that Python acts on
    # between two operations, and a single power can take for ever.
    return _math_verify().parse(text, parsing_timeout=None)


def _math_verify() -> Any:
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # warns that limits are off
    return importlib.import_module("math_verify")


# --------------------------------------------------------------------------- functions by name


@dataclass(frozen=True)
class BuiltIn:
    """A reward function of our own, and what we know about it."""

    reward: RewardFunction
    in_form: Callable[[str], bool]  # whether a completion states an answer as it should
    takes: Callable[[str], bool]  # whether a text can be a reference, as far as is cheap to tell
    expects: str  # of a reference


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
        lambda reference: bool(_stated_reference(reference).strip("$ \t\r\n")),
        "an answer in text or LaTeX",
    ),
}


def load_reward(spec: str) -> RewardFunction:
    """The reward function of "gsm8k", "math" or "package.module:function".

    Raises:
        ConfigError: the module can't be imported, or has no such function.
    """
    if spec in BUILT_IN:
        return BUILT_IN[spec].reward
    key = f"reward.function is '{spec}'"
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ConfigError(f"{key}, {_EXPECTED}")
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


def check_reward(config: RewardConfig, max_new_tokens: int) -> None:
    """Whether rollouts of this length can be scored like this, before any work starts.

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
    """What the reward function can't take about a reference, to end a sentence; None if nothing.

    Of a user's function nothing is known, so it takes any.
    """
    built_in = BUILT_IN.get(function)
    if built_in is None or built_in.takes(reference):
        return None
    return f"expected {built_in.expects}, which reward.function='{function}' compares with"


# --------------------------------------------------------------------------- one completion


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
        """Never raises: an exception of a user's may not survive the way between processes."""
        try:
            value = self.reward(prompt, completion, reference)
            number = float(value) if isinstance(value, Real) else math.nan
            if not math.isfinite(number):
                return Verdict(fault=_short(f"returned {value!r}"))
            return Verdict(number, self.in_form(completion))
        except BaseException as error:  # user code may raise anything, SystemExit too
            return Verdict(fault=f"raised {_summary(error)}")


def load_judge(function: str, pattern: str | None) -> Judge:
    """The judge of ``reward.function`` and ``reward.format_pattern``.

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
    """What a completion of ``length`` tokens loses, ``limit`` being the most it may have.

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


def _summary(error: BaseException) -> str:
    """An exception in one line."""
    return _short(f"{type(error).__name__}: {error}").removesuffix(":")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_FAULT else f"{line[:_LONGEST_FAULT]}..."
