"""One rank of a run: check, join the process group, build the run, run, leave.

Started through `processes.entry`, or entered directly under torchrun and srun. A failure is
written to ``logs/error_rank<r>.json`` and ends the process at once. A run that stops early is left
in order, by all ranks together.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from proma_megatron.config.loading import load_config
from proma_megatron.config.run import RunConfig
from proma_megatron.data.loading import prepare_data
from proma_megatron.distributed.devices import check_precision, check_replicas, choose_device
from proma_megatron.distributed.topology import layout, process_group
from proma_megatron.errors import RunStopped
from proma_megatron.files import disk_errors
from proma_megatron.observability.reporter import NullReporter, Reporter, RunReporter
from proma_megatron.processes import logs
from proma_megatron.processes.failures import fail, record_error
from proma_megatron.processes.stopping import (
    StopAgreement,
    StopSignals,
    run_clock_start,
    write_stop,
)
from proma_megatron.processes.watchdog import Phases, Watchdog
from proma_megatron.rewards.registry import check_reward
from proma_megatron.runs.directory import RunDir, with_own_tokenizer
from proma_megatron.training.build import build_run


def run_rank(config: RunConfig, resume: bool, signals: StopSignals) -> None:
    """Run this rank's part of a training, by torchrun's environment variables.

    The run directory and its tokenizer are there once the process group is: the launcher, or rank
    0, has made them. What can be checked alone is checked before, on every rank.

    Args:
        signals: those that this rank notes.

    Raises:
        RunStopped: the run stopped early, with everything saved; on every rank, and when none of
            them is busy any more.
    """
    check_replicas(config, int(os.environ["WORLD_SIZE"]))
    device_type = choose_device(config.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    check_precision(config, device_type)
    check_reward(config.reward, config.rollout.max_new_tokens)
    if device_type == "cpu":
        torch.set_num_threads(config.trainer.threads)
    run_dir = RunDir(config.run_dir)
    with process_group(device_type, config.trainer.timeout_minutes) as device:
        phases = Phases(config.trainer.phase_minutes)
        try:
            logs.keep(run_dir.logs, dist.get_rank())
            # --resume-or-start looks at the disk, and file systems of many nodes lag behind.
            answer = [resume]
            dist.broadcast_object_list(answer, src=0, device=device)
            (resume,) = answer
            with Watchdog(run_dir.logs, phases, dist.get_rank()) as watchdog:
                watchdog.meet_peers()
                _run_in_group(config, run_dir, device, resume, signals, phases)
        except RunStopped as stop:
            if dist.get_rank() == 0:
                with contextlib.suppress(OSError):  # all is saved, whether or not this is
                    write_stop(stop, run_dir.logs)
            dist.barrier()  # torchrun ends the others as soon as one has left
            raise
        except BaseException as error:  # torch's CheckpointException is no Exception
            fail(run_dir.logs, error)


def _run_in_group(
    config: RunConfig,
    run_dir: RunDir,
    device: torch.device,
    resume: bool,
    signals: StopSignals | None = None,
    phases: Phases | None = None,
) -> None:
    phases = phases or Phases()
    minutes = config.trainer.timeout_minutes
    with layout(config.parallel, device, config.seed, minutes) as topology:
        with phases.phase("setup"):
            data = prepare_data(with_own_tokenizer(config) if resume else config, run_dir.tokenizer)
        stops = StopAgreement(
            topology, signals or StopSignals(), config.trainer.max_minutes, run_clock_start()
        )
        reporter: Reporter = NullReporter()
        if topology.is_main:
            with disk_errors(run_dir.environment):
                run_dir.write_environment(_device_name(device))
            reporter = RunReporter(config.name, run_dir, config.trainer.steps)
        run = None
        try:
            with phases.phase("setup"):
                run = build_run(config, data, topology, run_dir, reporter, phases, stops)
            run.run(resume)
        except RunStopped:
            raise
        except BaseException as error:
            record_error(run_dir.logs, error)
            raise
        finally:
            if run is not None:
                run.close()
            reporter.close()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def main(arguments: Sequence[str]) -> None:
    path, *flags = arguments
    config = load_config(Path(path))
    try:
        with StopSignals() as signals:
            run_rank(config, "--resume" in flags, signals)
    except RunStopped:
        return  # the launcher reads what rank 0 has left
    except Exception as error:
        fail(RunDir(config.run_dir).logs, error)
