"""What ends a run and needs no traceback: the message says what it was, and what to do."""

from __future__ import annotations


class RunError(RuntimeError):
    """The run can't go on; the message is complete and meant for the user."""
