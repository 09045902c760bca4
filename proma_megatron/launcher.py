"""Start a run's workers on this machine, or take part in a run that torchrun or srun started."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from proma_megatron.config import ConfigError, RunConfig, dump_config
from proma_megatron.placement import check_world_size, choose_device
from proma_megatron.rollout.rewards import RewardError, load_reward
from proma_megatron.rollout.source import prepare_data
from proma_megatron.run_dir import RunDir, prepare_run_dir


class WorkerError(RuntimeError):
    """A rank failed; the message holds that rank's own traceback."""


def train(config: RunConfig, *, resume: bool, overwrite: bool) -> None:
    """Run the training of this configuration to its end.

    Raises:
        ConfigError: the configuration, its data or the run directory don't fit.
        RewardError: the reward function failed on a sample.
        WorkerError: a worker failed in any other way.
    """
    adopt_slurm(os.environ)
    if "RANK" in os.environ:
        _take_part(config, resume=resume, overwrite=overwrite)
    else:
        _start_workers(config, resume=resume, overwrite=overwrite)


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Give an srun task the variables that torchrun would have set."""
    if "RANK" in environment or int(environment.get("SLURM_NTASKS", "1")) < 2:
        return
    if "SLURM_PROCID" not in environment or "SLURM_STEP_ID" not in environment:
        return  # inside an allocation, but not a task of srun
    nodes = environment.get("SLURM_STEP_NODELIST", environment["SLURM_NODELIST"])
    names = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
    ).stdout.split()
    tasks = int(environment["SLURM_NTASKS"])
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=environment["SLURM_NTASKS"],
        LOCAL_RANK=environment["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(max(1, tasks // len(names))),
    )
    environment.setdefault("MASTER_ADDR", names[0])
    # Two jobs on one node must not meet.
    environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 20000))


def _take_part(config: RunConfig, *, resume: bool, overwrite: bool) -> None:
    """One rank among those that torchrun or srun started."""
    from proma_megatron.worker import record_error, run_worker

    check_world_size(config.parallel, int(os.environ["WORLD_SIZE"]))
    if os.environ["RANK"] == "0":
        run_dir = prepare_run_dir(config.run_dir, resume, overwrite)
        run_dir.config.write_text(dump_config(config))
    try:
        run_worker(config, resume)
    except Exception as error:
        if RunDir(config.run_dir).logs.is_dir():
            record_error(RunDir(config.run_dir).logs, error)
        raise


def _start_workers(config: RunConfig, *, resume: bool, overwrite: bool) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    workers = config.parallel.model_size * (config.parallel.data or 1)
    device = choose_device(config.device, workers)
    run_dir = prepare_run_dir(config.run_dir, resume, overwrite)
    # What can be wrong with data and reward is said before any worker starts.
    load_reward(config.reward.function)
    prepare_data(config, run_dir.path / "tokenizer.model")
    run_dir.config.write_text(dump_config(config))
    for stale in run_dir.logs.glob("error_rank*.json"):
        stale.unlink()
    print(
        f"{config.name}: {workers} workers on {device}, "
        f"tensor {config.parallel.tensor} x pipeline {config.parallel.pipeline} x "
        f"data {config.parallel.data or 1}; files in {config.run_dir}",
        flush=True,
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(config.trainer.threads))
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=config.name,
        max_restarts=0,
        start_method="spawn",
        # Rank 0 has the terminal; what the others print goes to logs/.
        logs_specs=DefaultLogsSpecs(
            log_dir=str(run_dir.logs),
            redirects=dict.fromkeys(range(1, workers), Std.ALL),
        ),
    )
    arguments = ["-u", "-m", "proma_megatron.worker", str(run_dir.config)]
    if resume:
        arguments.append("--resume")
    try:
        elastic_launch(launch, entrypoint=sys.executable)(*arguments)
    except ChildFailedError as failure:
        raise _first_error(run_dir.logs, failure) from None
    except SignalException as signal:
        raise WorkerError(
            f"stopped by signal {signal.sigval.name}; continue with --resume"
        ) from None


def _first_error(logs: Path, failure: Any) -> Exception:
    """What went wrong first: ranks that fail later fail because a peer has gone."""
    records = [json.loads(path.read_text()) for path in logs.glob("error_rank*.json")]
    if not records:
        rank, found = failure.get_first_failure()
        how = f"signal {-found.exitcode}" if found.exitcode < 0 else f"exit code {found.exitcode}"
        return WorkerError(
            f"rank {rank} ended with {how} and left no error; its output is in {logs}"
        )
    first = min(records, key=lambda record: record["time"])
    if first["config"]:
        return ConfigError(first["message"])
    if first["kind"] == "RewardError":
        return RewardError(first["message"])
    return WorkerError(f"rank {first['rank']} failed:\n{first['traceback']}")
