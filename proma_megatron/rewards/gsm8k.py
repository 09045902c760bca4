"""The score of a number, as GSM8K states answers."""

from __future__ import annotations

from proma_megatron.data.answers import final_answer, parse_number


def gsm8k(prompt: str, completion: str, reference: str) -> float:
    """Return 1.0 if the number after the completion's last "####" equals the reference, else 0.0.

    Numbers are compared as numbers, so 1,000 equals $1000.00.

    Raises:
        ValueError: the reference is not a number.
    """
    expected = parse_number(reference)
    if expected is None:
        raise ValueError(f"the reference is {reference!r}, expected a number")
    return 1.0 if final_answer(completion) == expected else 0.0
