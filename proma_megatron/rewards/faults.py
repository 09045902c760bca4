"""What a user's reward function said when it failed, in one line."""

from __future__ import annotations

LONGEST = 500  # characters of what a user's function said, in an error message


def summary(error: BaseException) -> str:
    """Return an exception in one line."""
    return shortened(f"{type(error).__name__}: {error}").removesuffix(":")


def shortened(text: str) -> str:
    """Return a text in one line of at most `LONGEST` characters."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."
