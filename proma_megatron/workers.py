"""Start one process per rank of a layout on this node, with torch elastic."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from proma_megatron.config import ProcessConfig
from proma_megatron.failure import LAUNCHED, StoppedError, first_error, forget_errors


def start_workers(
    module: str,
    arguments: Sequence[str],
    *,
    count: int,
    name: str,
    logs: Path,
    process: ProcessConfig,
) -> None:
    """Run ``module.main(arguments)`` on ``count`` ranks, to the end.

    Rank 0 has the terminal; what the others print goes to ``logs``.

    Raises:
        ConfigError, RewardError, WorkerError: what the rank that failed first left behind.
        StoppedError: a signal ended the launcher.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    forget_errors(logs)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(process.threads))
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=name,
        max_restarts=0,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(
            log_dir=str(logs), redirects=dict.fromkeys(range(1, count), Std.ALL)
        ),
    )
    try:
        elastic_launch(launch, entrypoint=sys.executable)(
            "-u", "-m", "proma_megatron.startup", module, *arguments
        )
    except ChildFailedError as failure:
        raise first_error(logs, failure) from None
    except SignalException as stop:
        raise StoppedError(f"stopped by signal {stop.sigval.name}") from None
