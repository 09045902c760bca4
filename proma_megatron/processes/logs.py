"""What a command tells beside its results: one tree of loggers, set up once in each process.

Results (a summary as JSON, a table) are printed on standard output. Everything else is a record of
``logging.getLogger(__name__)``, all of which are below ``proma_megatron``:

    ERROR    why a command ends with another code than 0
    WARNING  what is likely not as the user wants it
    INFO     notes and progress: the level where nothing else is asked for
    DEBUG    what the processes do, with time, rank and module

A record is shown on standard error, or as its ``extra`` asks, such as `STDOUT`. A program that uses
the package without its commands calls `configure`, or has handlers of its own.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from proma_megatron.errors import ConfigError

LEVEL = "PROMA_LOG_LEVEL"  # in the environment, which ranks and stages inherit
LEVELS = ("ERROR", "WARNING", "INFO", "DEBUG")

_ROOT = logging.getLogger("proma_megatron")


def _print_to_stdout(text: str) -> None:
    print(text, flush=True)


# ``extra`` of a record that belongs to standard output. ``show`` takes the line.
STDOUT = {"show": _print_to_stdout}


class _Lines(logging.Formatter):
    """Records as they are; those of DEBUG with time, rank and module before them."""

    def __init__(self, *, whole: bool = False) -> None:
        """Take note of the style.

        Args:
            whole: every record has the same before it.
        """
        super().__init__()
        self._whole = whole

    def format(self, record: logging.LogRecord) -> str:
        if not self._whole and record.levelno > logging.DEBUG:
            return record.getMessage()
        rank = os.environ.get("RANK")
        where = record.name if rank is None else f"rank {rank} {record.name}"
        return f"{self.formatTime(record)} {record.levelname} {where}: {record.getMessage()}"


class _Terminal(logging.Handler):
    """Shows records on the streams of the moment, which ranks and live displays replace.

    A stream that can't be written to fails as `print` does, with its own exception.
    """

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        show = getattr(record, "show", None)
        if show is not None:
            show(text)
        else:
            print(text, file=sys.stderr, flush=True)


def configure(level: str | None = None) -> None:
    """Show records of this process from this level on; called again, it changes the level.

    Args:
        level: one of `LEVELS`, also for the processes that this one starts; None: that of the
            environment variable `LEVEL`, and INFO where it isn't set.

    Raises:
        ConfigError: the variable holds another word.
    """
    if level is not None:
        os.environ[LEVEL] = level
    name = os.environ.get(LEVEL, "INFO")
    if name.upper() not in LEVELS:
        raise ConfigError(f"{LEVEL} is {name!r}, expected one of {', '.join(LEVELS)}; unset it")
    if not any(isinstance(handler, _Terminal) for handler in _ROOT.handlers):
        terminal = _Terminal()
        terminal.setFormatter(_Lines())
        _ROOT.addHandler(terminal)
        _ROOT.propagate = False  # libraries give the root logger handlers of their own
    _ROOT.setLevel(name.upper())


def keep(folder: Path, rank: int) -> None:
    """Append this rank's records to ``rank<r>.log`` in this folder, where DEBUG is asked for."""
    if not _ROOT.isEnabledFor(logging.DEBUG):
        return
    path = folder / f"rank{rank}.log"
    try:
        kept = logging.FileHandler(path)
    except OSError as error:
        _ROOT.warning("%s can't be written (%s), so it isn't", path, error.strerror)
        return
    kept.setFormatter(_Lines(whole=True))
    _ROOT.addHandler(kept)
