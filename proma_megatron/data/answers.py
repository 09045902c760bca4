"""GSM8K's way to state an answer: a number after "####"."""

from __future__ import annotations

import re
from decimal import Decimal

ANSWER_MARK = "####"
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)")


def parse_number(text: str) -> Decimal | None:
    """Return the number that ``text`` starts with, without "$", "," and a final "."; None if none.

    The number ends at the first whitespace and must be the whole of what precedes it.
    """
    words = text.replace("$", "").replace(",", "").split(maxsplit=1)
    word = words[0].removesuffix(".") if words else ""
    return Decimal(word) if _NUMBER.fullmatch(word) else None


def final_answer(text: str) -> Decimal | None:
    """Return the number after the last "####" on the same line, or None."""
    _, mark, rest = text.rpartition(ANSWER_MARK)
    lines = rest.splitlines()
    return parse_number(lines[0]) if mark and lines else None
