"""Messages to users, by what they must name: a sentence may be written anew, a name not go missing.

The key or file, the value, and the way out each are a part of their own.
"""

from __future__ import annotations

import pytest


def assert_names(error: pytest.ExceptionInfo[BaseException] | str, *parts: str) -> None:
    """Check that a message is one line and has each of these parts in it.

    Args:
        error: what `pytest.raises` caught, or the message itself.
        parts: at least one; none may be empty.
    """
    message = error if isinstance(error, str) else str(error.value)
    assert "\n" not in message.rstrip("\n"), message
    assert parts
    assert all(parts)
    missing = [part for part in parts if part not in message]
    assert not missing, f"{message!r} does not name {missing}"
