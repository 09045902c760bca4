"""How a rank that fails says so, and how the launcher finds out which one failed first.

A rank writes ``error_rank<r>.json`` and ends at once; the launcher reads what is there. Python
stacks of ranks that hung, crashed or were ended with it are in ``stacks/``, see `watchdog`.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from proma_megatron.config.constants import STOPPED_FILE
from proma_megatron.errors import (
    ConfigError,
    HangError,
    RewardError,
    RunError,
    WorkerError,
)
from proma_megatron.files import write_once

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

logger = logging.getLogger(__name__)

LAUNCHED = "PROMA_LAUNCHER"  # in the environment of ranks that our own launcher started: its pid


# --------------------------------------------------------------------------- on a rank


def fail(logs: Path | None, error: BaseException) -> NoReturn:
    """Record what stopped this rank and end the process, without waiting for the other ranks.

    Without ``logs`` it is only shown.

    Leaving in an orderly way would tear down the process group first, which can wait for peers
    that are still inside a collective.
    """
    recorded = logs is not None and record_error(logs, error)
    if LAUNCHED not in os.environ or not recorded:  # else the launcher shows the first of all ranks
        expected = isinstance(error, ConfigError | RunError)
        if not expected:
            traceback.print_exception(error)
        else:
            logger.error("%s", in_words(error))
    sys.stdout.flush()
    sys.stderr.flush()
    end(2 if isinstance(error, ConfigError) else 1)


def in_words(error: BaseException) -> str:
    """Put an error in a line for a terminal that many ranks write to."""
    rank = os.environ.get("RANK", "0")
    return f"error{'' if rank == '0' else f' on rank {rank}'}: {error}"


def end(code: int) -> NoReturn:
    """End this process and those that it started, without waiting for anything."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def record_error(logs: Path, error: BaseException) -> bool:
    """Write what stopped this rank to ``error_rank<r>.json``; what it failed of first stays.

    Where the run's own folder does not take it, it goes to the system's temporary one. Whether
    one of them took it.

    To be called before the rank lets go of anything: its peers fail as soon as a process group is
    torn down, and whoever writes first is taken for the one that failed first.
    """
    record = {
        "rank": int(os.environ.get("RANK", "0")),
        "time": time.time(),
        "clock": time.monotonic(),  # one for all processes of a machine, and nobody sets it
        "kind": type(error).__name__,
        "message": str(error),
        "config": isinstance(error, ConfigError),
        "expected": isinstance(error, RunError),
        "traceback": "".join(traceback.format_exception(error)),
    }
    for folder in _places(logs, os.environ.get(LAUNCHED)):
        try:
            write_once(folder / f"error_rank{record['rank']}.json", json.dumps(record))
        except OSError:
            continue  # full or gone, which may be what the error is about
        return True
    return False


def _places(logs: Path, launcher: str | None) -> list[Path]:
    """Return where ranks of this launcher leave their errors, in order of preference."""
    if launcher is None:
        return [logs]
    return [logs, Path(tempfile.gettempdir()) / f"proma-errors-{launcher}"]


# --------------------------------------------------------------------------- in the launcher


def forget_earlier(logs: Path) -> None:
    """Remove what ranks of an earlier attempt left: errors, stacks, and why they stopped."""
    stale = (*_recorded(logs), *logs.glob("error_rank*"), *stacks_folder(logs).glob("*"))
    for path in (*stale, logs / STOPPED_FILE):
        path.unlink(missing_ok=True)


def stacks_folder(logs: Path) -> Path:
    return logs / "stacks"


def first_error(logs: Path, failure: ChildFailedError, ended: Collection[int] = ()) -> Exception:
    """Return what went wrong first: ranks that fail later fail because a peer has gone.

    Args:
        ended: ranks that were still there when the launcher began to end them.
    """
    records = [json.loads(path.read_text()) for path in _recorded(logs)]
    known = {record["rank"] for record in records} | set(ended)
    for rank, found in failure.failures.items():
        if rank not in known:  # it left without a word, and before those that it left alone
            return WorkerError(f"rank {rank} {_ending(found.exitcode)}; its output is in {logs}")
    if not records:
        rank, found = failure.get_first_failure()
        return WorkerError(f"rank {rank} {_ending(found.exitcode)}; its output is in {logs}")
    first = min(records, key=lambda record: record["clock"])
    if first["config"]:
        return ConfigError(first["message"])
    if first["kind"] == "RewardError":
        return RewardError(f"{first['message']} (traceback in {logs})")
    if first["expected"]:
        return RunError(first["message"])
    if first["kind"] == "HangError":
        return HangError(first["message"])
    return WorkerError(f"rank {first['rank']} failed:\n{first['traceback']}")


def _recorded(logs: Path) -> list[Path]:
    return [
        path
        for folder in _places(logs, str(os.getpid()))
        for path in folder.glob("error_rank*.json")
    ]


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code} and left no error"
    often = ", often for lack of memory" if code == -signal.SIGKILL else ""
    return f"was ended by signal {-code} ({signal.Signals(-code).name}{often})"
