"""Start a run's workers on this machine, or take part in a run that torchrun or srun started."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

import yaml

from proma_megatron.checkpoints.compatibility import check_model, check_optimizer
from proma_megatron.checkpoints.integrity import check_sizes
from proma_megatron.config.constants import EXIT_STOPPED, STOP_CODE
from proma_megatron.config.loading import differences, dump_config, read_tree
from proma_megatron.config.run import RunConfig, check_data_files, check_model_files
from proma_megatron.data.loading import check_demonstrations, prepare_data
from proma_megatron.distributed.devices import check_precision, check_replicas, choose_device
from proma_megatron.errors import RunStopped, StoppedError, WorkerError
from proma_megatron.files import write_synced
from proma_megatron.processes.elastic import start_ranks
from proma_megatron.processes.entry import defer_compilation
from proma_megatron.processes.failures import end, forget_earlier
from proma_megatron.processes.logs import STDOUT
from proma_megatron.processes.ranks import is_first_rank
from proma_megatron.processes.slurm import adopt_slurm
from proma_megatron.processes.stopping import StopSignals, start_run_clock
from proma_megatron.rewards.registry import check_references, check_reward
from proma_megatron.runs.checkpoint_folder import is_warm_start, read_marker
from proma_megatron.runs.companions import keep_companions
from proma_megatron.runs.directory import RunDir, prepare_run_dir, with_own_tokenizer
from proma_megatron.weights.huggingface import conversion_note, read_model

logger = logging.getLogger(__name__)


def train(config: RunConfig, *, resume: bool, overwrite: bool) -> None:
    """Run the training of this configuration to its end.

    Raises:
        ConfigError: the configuration, its data or the run directory don't fit.
        RewardError: the reward function failed on a sample.
        RunStopped: it stopped early, with everything saved.
        WorkerError: a worker failed in any other way.
    """
    start_run_clock()
    adopt_slurm(os.environ)
    if "RANK" in os.environ:
        _take_part(config, resume=resume, overwrite=overwrite)
    else:
        _start_ranks(config, resume=resume, overwrite=overwrite)


def _take_part(config: RunConfig, *, resume: bool, overwrite: bool) -> None:
    """Run one rank among those that torchrun or srun started."""
    check_replicas(config, int(os.environ["WORLD_SIZE"]))
    if os.environ["RANK"] == "0":
        run_dir = _prepare(config, resume=resume, overwrite=overwrite)
        forget_earlier(run_dir.logs)
    defer_compilation()
    with StopSignals() as signals:  # importing takes seconds, too
        from proma_megatron.commands.train.rank import run_rank

        try:
            run_rank(config, resume, signals)
        except RunStopped as stop:
            # At once: torchrun and `srun -K` end the ranks that are still at it when one has left.
            if is_first_rank():
                logger.error("%s", stop)
            end(int(os.environ.get(STOP_CODE, EXIT_STOPPED)))


def _prepare(config: RunConfig, *, resume: bool, overwrite: bool) -> RunDir:
    """Check everything that the run reads, then make its directory, with tokenizer and config.

    In this order: a run that can't start must not remove the one that the directory holds.
    """
    with tempfile.TemporaryDirectory() as folder:
        trained = Path(folder) / "tokenizer.model"
        if resume and RunDir(config.run_dir).tokenizer.is_file():
            trained = RunDir(config.run_dir).tokenizer
        notes = _check(config, trained, resume=resume)
        run_dir = prepare_run_dir(config.run_dir, resume, overwrite)
        if trained.is_file() and trained != run_dir.tokenizer:
            shutil.copyfile(trained, run_dir.tokenizer)
    if resume:
        notes += _going_on(config, run_dir)
    else:
        keep_companions(config, run_dir)
    write_synced(run_dir.config, dump_config(config))
    for text in notes:
        logger.info("%s: %s", config.name, text, extra=STDOUT)
    return run_dir


def _going_on(config: RunConfig, run_dir: RunDir) -> list[str]:
    """Check the checkpoint as far as that takes no time; return what has changed since."""
    newest, first = run_dir.latest_checkpoint(), run_dir.checkpoint(0)
    assert newest is not None, "prepare_run_dir refuses to resume without one"
    for path in (newest,) if is_warm_start(newest) else (newest, first):
        marker = read_marker(path)
        check_model(path, marker, config.model, config.model.vocab_size)
        check_optimizer(path, marker, config.model, config.optimizer)
        check_sizes(path, marker)
    if not run_dir.config.is_file():
        return []
    wanted = yaml.safe_load(dump_config(config))
    return [
        f"goes on with {key}={new}, which was {old}"
        for key, old, new in differences(read_tree(run_dir.config), wanted)
    ]


def check_run(config: RunConfig) -> None:
    """Check that a run of this configuration could start here; nothing is made or removed.

    Raises:
        ConfigError: it could not.
    """
    check_precision(config, choose_device(config.device, config.parallel.world_size))
    with tempfile.TemporaryDirectory() as folder:
        _check(config, Path(folder) / "tokenizer.model", resume=False)


def _check(config: RunConfig, trained: Path, *, resume: bool) -> list[str]:
    """Check everything that the run reads; return notes for the user.

    Args:
        trained: where a tokenizer that the run trains itself is, or is written to.
    """
    notes: list[str | None] = []
    check_data_files(config)
    check_reward(config.reward, config.rollout.max_new_tokens)
    if not resume:  # with which the weights come from a checkpoint
        check_model_files(config)
        if config.model.path is not None:
            notes.append(conversion_note(read_model(config.model.path, config.model)))
    data = prepare_data(with_own_tokenizer(config) if resume else config, trained)
    check_references(config.reward.function, (*data.train.all(), *data.validation))
    check_demonstrations(config, data)
    return [note for note in (*notes, *data.notes) if note]


def _start_ranks(config: RunConfig, *, resume: bool, overwrite: bool) -> None:
    workers = config.parallel.world_size
    device = choose_device(config.device, workers)
    check_precision(config, device)
    run_dir = _prepare(config, resume=resume, overwrite=overwrite)
    logger.info(
        f"{config.name}: {workers} workers on {device}, "
        f"tensor {config.parallel.tensor} x pipeline {config.parallel.pipeline} x "
        f"data {config.parallel.data or 1}; files in {config.run_dir}",
        extra=STDOUT,
    )
    arguments = [str(run_dir.config)]
    if resume:
        arguments.append("--resume")
    try:
        start_ranks(
            "proma_megatron.commands.train.rank",
            arguments,
            count=workers,
            name=config.name,
            logs=run_dir.logs,
            process=config.trainer,
            graceful=True,
        )
    except StoppedError as stop:
        raise WorkerError(f"{stop}; --resume continues from the newest checkpoint") from None
