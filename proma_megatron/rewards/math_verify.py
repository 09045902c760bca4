"""The score of a mathematical answer, decided by math-verify."""

from __future__ import annotations

import importlib
import logging
import re
from typing import Any


def math_answer(prompt: str, completion: str, reference: str) -> float:
    """Return 1.0 if math-verify finds the completion's answer equal to the reference, else 0.0.

    The answer is what stands in the last complete "\\boxed{...}"; without one, what math-verify
    takes for the answer in the text. The reference is LaTeX, with or without a box or dollars, or
    plain text such as "3,000" or "1/2".

    There are expressions that this doesn't come back from; `scoring.Scorer` sets the limit.

    Raises:
        ValueError: the reference holds no answer.
    """
    expected = _parsed(stated_reference(reference))
    if not expected:
        raise ValueError(f"the reference is {reference!r}, expected an answer in text or LaTeX")
    # The order matters: math-verify lets an answer x = 3 stand for 3 according to which is which.
    return (
        1.0 if _math_verify().verify(expected, _answer(completion), timeout_seconds=None) else 0.0
    )


def holds_answer(reference: str) -> bool:
    """Tell whether math-verify finds an answer in a reference; parsing is all that it does here."""
    return bool(_parsed(stated_reference(reference)))


def last_box(text: str) -> str | None:
    """Return what stands in the last "\boxed{...}" of the text that is closed, or None.

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
    """Return the answer as math-verify has it: no element, or its value and its text."""
    # math-verify itself would make one set of all boxes, and a model that corrects itself be wrong.
    box = last_box(completion)
    return _parsed(completion if box is None else f"${box}$")


def stated_reference(reference: str) -> str:
    """Return the reference as LaTeX that math-verify finds: of bare LaTeX it sees only numbers."""
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
