"""How a rank that fails says so, and how the launcher finds out which one failed first.

A rank writes ``error_rank<r>.json`` and ends at once; the launcher reads what is there.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from proma_megatron.config import ConfigError
from proma_megatron.rollout.rewards import RewardError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

LAUNCHED = "PROMA_LAUNCHER"  # in the environment of ranks that our own launcher started


class WorkerError(RuntimeError):
    """A rank failed; the message holds that rank's own traceback."""


class StoppedError(WorkerError):
    """The workers were ended by a signal to the launcher."""


# --------------------------------------------------------------------------- on a rank


def fail(logs: Path | None, error: BaseException) -> NoReturn:
    """Record what stopped this rank and end the process, without waiting for the other ranks.

    Without ``logs`` it is only shown.

    Leaving in an orderly way would tear down the process group first, which can wait for peers
    that are still inside a collective.
    """
    if logs is not None:
        record_error(logs, error)
    if LAUNCHED not in os.environ:  # the launcher shows the first error of all ranks
        expected = isinstance(error, ConfigError | RewardError)
        if not expected:
            traceback.print_exception(error)
        else:
            rank = os.environ["RANK"]
            print(f"error{'' if rank == '0' else f' on rank {rank}'}: {error}", file=sys.stderr)
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2 if isinstance(error, ConfigError) else 1)


def record_error(logs: Path, error: BaseException) -> None:
    """Write what stopped this rank to ``error_rank<r>.json``."""
    record = {
        "rank": int(os.environ.get("RANK", "0")),
        "time": time.time(),
        "kind": type(error).__name__,
        "message": str(error),
        "config": isinstance(error, ConfigError),
        "traceback": "".join(traceback.format_exception(error)),
    }
    (logs / f"error_rank{record['rank']}.json").write_text(json.dumps(record))


# --------------------------------------------------------------------------- in the launcher


def forget_errors(logs: Path) -> None:
    """Remove what ranks of an earlier attempt left."""
    for stale in logs.glob("error_rank*.json"):
        stale.unlink()


def first_error(logs: Path, failure: ChildFailedError) -> Exception:
    """What went wrong first: ranks that fail later fail because a peer has gone."""
    records = [json.loads(path.read_text()) for path in logs.glob("error_rank*.json")]
    recorded = {record["rank"] for record in records}
    for rank, found in failure.failures.items():
        # The agent ends the remaining workers with SIGTERM; any other signal came first.
        if rank not in recorded and found.exitcode < 0 and found.exitcode != -signal.SIGTERM:
            return WorkerError(
                f"rank {rank} was ended by signal {-found.exitcode} "
                f"({signal.Signals(-found.exitcode).name}); its output is in {logs}"
            )
    if not records:
        rank, found = failure.get_first_failure()
        return WorkerError(
            f"rank {rank} ended with exit code {found.exitcode} and left no error; its output is "
            f"in {logs}"
        )
    first = min(records, key=lambda record: record["time"])
    if first["config"]:
        return ConfigError(first["message"])
    if first["kind"] == "RewardError":
        return RewardError(f"{first['message']} (traceback in {logs})")
    return WorkerError(f"rank {first['rank']} failed:\n{first['traceback']}")
