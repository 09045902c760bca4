"""Every exception that ends a run or refuses one: its message is a sentence for the user."""

from __future__ import annotations

from pathlib import Path


class RunError(RuntimeError):
    """The run can't go on; the message is complete and meant for the user."""


class StorageError(RunError):
    """The disk does not take, or no longer holds, what the run needs; the message names the file
    and is complete."""


class ConfigError(ValueError):
    """A configuration that can't run; the message is complete and meant for the user."""


class WorkerError(RuntimeError):
    """A rank failed; the message holds that rank's own traceback."""


class StoppedError(WorkerError):
    """The workers were ended by a signal to the launcher."""


class HangError(WorkerError):
    """A phase of the run took longer than it may; the message says what each rank was at."""


class RunStopped(Exception):  # noqa: N818 - no error
    """The run ends before its last step, on request, on every rank alike.

    Args:
        reason: "SIGTERM", "trainer.max_minutes=30".
        step: RL steps that the saved policy has seen.
        checkpoint: the complete checkpoint to go on from; None if there is none yet.
    """

    def __init__(self, reason: str, step: int, checkpoint: Path | None) -> None:
        super().__init__(reason, step, checkpoint)  # all of them, for pickle
        self.reason, self.step, self.checkpoint = reason, step, checkpoint

    def __str__(self) -> str:
        when = f"after step {self.step}" if self.step else "before the first RL step"
        if self.checkpoint is None:
            return f"stopped by {self.reason} {when}; nothing is saved yet, start again"
        return (
            f"stopped by {self.reason} {when}; {self.checkpoint} is complete, --resume goes on "
            "from there"
        )


class NonFiniteError(RunError):
    """Too many steps in a row made no update, because it was not finite."""


class UnreachableError(RunError):
    """A cluster can't be asked; a job that it runs is none the worse for it."""


class LaunchError(RunError):
    """A cluster refused a job."""


class RewardError(RunError):
    """A reward function failed, or gave something that is no finite number."""
