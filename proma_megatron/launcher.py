"""Start a run's workers on this machine, or take part in a run that torchrun or srun started."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

from proma_megatron.config import ConfigError, RunConfig, dump_config
from proma_megatron.placement import check_precision, check_replicas, choose_device
from proma_megatron.rollout.rewards import RewardError, load_reward
from proma_megatron.rollout.source import check_demonstrations, prepare_data
from proma_megatron.run_dir import RunDir, prepare_run_dir

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


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
    """Give an srun task the variables that torchrun would have set.

    Raises:
        ConfigError: the first node's address can't be found out.
    """
    if "RANK" in environment or int(environment.get("SLURM_NTASKS", "1")) < 2:
        return
    if "SLURM_PROCID" not in environment or "SLURM_STEP_ID" not in environment:
        return  # inside an allocation, but not a task of srun
    tasks = int(environment["SLURM_NTASKS"])
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", "1")))
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=environment["SLURM_NTASKS"],
        LOCAL_RANK=environment["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(-(-tasks // nodes)),
    )
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = _first_node(environment)
    # Two jobs on one node must not meet.
    environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 20000))


def _first_node(environment: MutableMapping[str, str]) -> str:
    names = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_NODELIST"]
    if "[" not in names:
        return names.split(",")[0]
    try:
        shown = subprocess.run(
            ["scontrol", "show", "hostnames", names], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        raise ConfigError(
            f"the first of the nodes {names} can't be found out without scontrol; set MASTER_ADDR "
            "to its address"
        ) from None
    return shown.stdout.split()[0]


def _take_part(config: RunConfig, *, resume: bool, overwrite: bool) -> None:
    """One rank among those that torchrun or srun started."""
    check_replicas(config, int(os.environ["WORLD_SIZE"]))
    if os.environ["RANK"] == "0":
        _prepare(config, resume=resume, overwrite=overwrite)
    from proma_megatron.worker import run_worker

    run_worker(config, resume)


def _prepare(config: RunConfig, *, resume: bool, overwrite: bool) -> RunDir:
    """Check everything that the run reads, then make its directory, with tokenizer and config.

    In this order: a run that can't start must not remove the one that the directory holds.
    """
    if resume and config.optimizer.distributed:
        raise ConfigError(
            "optimizer.distributed is true with --resume, which Megatron-Core 0.19 can't load "
            "with torch's Adam; resume needs a run with optimizer.distributed=false"
        )
    load_reward(config.reward.function)
    with tempfile.TemporaryDirectory() as folder:
        trained = Path(folder) / "tokenizer.model"
        if resume and RunDir(config.run_dir).tokenizer.is_file():
            trained = RunDir(config.run_dir).tokenizer
        check_demonstrations(config, prepare_data(config, trained))
        run_dir = prepare_run_dir(config.run_dir, resume, overwrite)
        if trained.is_file() and trained != run_dir.tokenizer:
            shutil.copyfile(trained, run_dir.tokenizer)
    run_dir.config.write_text(dump_config(config))
    return run_dir


def _start_workers(config: RunConfig, *, resume: bool, overwrite: bool) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    workers = config.parallel.model_size * (config.parallel.data or 1)
    device = choose_device(config.device, workers)
    check_precision(config, device)
    run_dir = _prepare(config, resume=resume, overwrite=overwrite)
    for stale in run_dir.logs.glob("error_rank*.json"):
        stale.unlink()
    print(
        f"{config.name}: {workers} workers on {device}, "
        f"tensor {config.parallel.tensor} x pipeline {config.parallel.pipeline} x "
        f"data {config.parallel.data or 1}; files in {config.run_dir}",
        flush=True,
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ["PROMA_LAUNCHER"] = "1"
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
    except SignalException as stop:
        raise WorkerError(
            f"stopped by signal {stop.sigval.name}; --resume continues from the newest checkpoint"
        ) from None


def _first_error(logs: Path, failure: ChildFailedError) -> Exception:
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
