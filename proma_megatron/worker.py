"""One rank of a run: join the process group, build the trainer, run, leave.

Started by `launcher` as ``python -m proma_megatron.worker CONFIG``, or entered directly under
torchrun and srun. A failure is written to ``logs/error_rank<r>.json`` for the launcher to show.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path

import torch

from proma_megatron.config import ConfigError, RunConfig, load_config
from proma_megatron.placement import choose_device
from proma_megatron.reporting import Live, Reporter, Silent
from proma_megatron.rollout.rewards import RewardError
from proma_megatron.rollout.source import prepare_data
from proma_megatron.run_dir import RunDir
from proma_megatron.topology import layout, process_group
from proma_megatron.trainer import Trainer


def run_worker(config: RunConfig, resume: bool) -> None:
    """The run of this rank, from torchrun's environment variables."""
    device_type = choose_device(config.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if device_type == "cpu":
        torch.set_num_threads(config.trainer.threads)
    run_dir = RunDir(config.run_dir)
    with (
        process_group(device_type, config.trainer.timeout_minutes) as device,
        layout(config.parallel, device, config.seed, config.trainer.timeout_minutes) as topology,
    ):
        # The first rank may have to train the tokenizer; the others find it on disk.
        tokenizer = run_dir.path / "tokenizer.model"
        data = prepare_data(config, tokenizer) if topology.is_main else None
        topology.barrier()
        data = data or prepare_data(config, tokenizer)
        reporter: Reporter = Silent()
        if topology.is_main:
            run_dir.write_environment(_device_name(device))
            reporter = Live(config.name, run_dir, config.trainer.steps)
        try:
            Trainer(config, data, topology, run_dir, reporter).run(resume)
        finally:
            reporter.close()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def error_path(logs: Path, rank: int) -> Path:
    return logs / f"error_rank{rank}.json"


def record_error(logs: Path, error: BaseException) -> None:
    """Write what stopped this rank; user errors without a traceback."""
    expected = isinstance(error, ConfigError | RewardError)
    record = {
        "rank": int(os.environ.get("RANK", "0")),
        "time": time.time(),
        "kind": type(error).__name__,
        "message": str(error),
        "config": isinstance(error, ConfigError),
        "traceback": None if expected else traceback.format_exc(),
    }
    error_path(logs, record["rank"]).write_text(json.dumps(record))


def main() -> int:
    path, *flags = sys.argv[1:]
    config = load_config(Path(path))
    try:
        run_worker(config, resume="--resume" in flags)
    except BaseException as error:  # torch's CheckpointException is no Exception
        record_error(RunDir(config.run_dir).logs, error)
        for child in multiprocessing.active_children():
            child.kill()
        # Interpreter shutdown would wait for collectives of ranks that are still in the run.
        sys.stdout.flush()
        os._exit(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
