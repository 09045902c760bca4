"""`proma compare`: one run after the other, each by `proma train`'s own launcher."""

from __future__ import annotations

import logging
import os
import shutil
import time

from rich.console import Console

from proma_megatron.commands.compare.results import (
    draw_comparison,
    groups_of,
    print_results,
    write_recipe,
)
from proma_megatron.commands.compare.runs import Comparison, Planned, started_from
from proma_megatron.commands.compare.state import Todo, todo
from proma_megatron.config.pretrained import CONFIG
from proma_megatron.config.run import RunConfig
from proma_megatron.errors import ConfigError
from proma_megatron.processes.logs import STDOUT
from proma_megatron.processes.slurm import adopt_slurm
from proma_megatron.runs.directory import RunDir, prepare_run_dir

logger = logging.getLogger(__name__)


def compare(comparison: Comparison, *, overwrite: bool, command: str) -> None:
    """Make the runs that are not finished yet, and draw all of them after each.

    Args:
        overwrite: remove what there is of these runs first.
        command: what was typed, for the files.

    Raises:
        ConfigError: a run can't start, or a directory holds a run of another configuration.
        RewardError, WorkerError: a run failed; the same command continues.
    """
    _check(comparison)
    if overwrite:
        _clear(comparison)
    _check_states(comparison)
    comparison.folder.mkdir(parents=True, exist_ok=True)
    write_recipe(comparison, command)
    try:
        runs = _from_one_policy(comparison)
        _make_all(comparison, runs, command)
    except BaseException:  # Ctrl-C, too
        again = "without --overwrite " if overwrite else ""
        logger.error(
            f"the comparison is not complete; the same command {again}continues it, and "
            "--algorithms leaves out one that can't be run"
        )
        raise
    files = draw_comparison(comparison, command)
    print_results(groups_of(comparison), Console())
    print(f"wrote {', '.join(str(path) for path in files)}")


def duration(seconds: float) -> str:
    """Return a duration in words: "45 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


# --------------------------------------------------------------------------- before the first run


def _check(comparison: Comparison) -> None:
    """Check that the runs could start; ConfigError if not."""
    environment = dict(os.environ)
    adopt_slurm(environment)
    if "RANK" in environment:
        raise ConfigError(
            "proma compare was started as one rank of several (RANK is "
            f"{environment['RANK']}), but starts the workers of each run itself; start it without "
            "torchrun or srun"
        )
    if RunDir(comparison.folder).holds_run:
        raise ConfigError(
            f"{comparison.folder} holds a run, expected a directory for several; give the "
            "comparison a name of its own, such as name=compare"
        )
    from proma_megatron.commands.train import command as launcher  # imports transformers: seconds

    # What differs between the runs has been validated; what they read is the same for all.
    launcher.check_run(comparison.initial or comparison.runs[0].config)


def _clear(comparison: Comparison) -> None:
    """Remove all runs of the folder and the policy that they started from, and nothing else.

    Also those of algorithms and seeds that are not asked for now: what would be left of an earlier
    comparison could not be told from runs of this one.
    """
    initial = comparison.initial
    made = [*comparison.made(), *([] if initial is None else [initial.run_dir])]
    for path in made:
        if RunDir(path).holds_run:
            prepare_run_dir(path, resume=False, overwrite=True)
    if initial is not None:
        _remove_policy(comparison)


def _check_states(comparison: Comparison) -> None:
    """Check that what is there belongs to this comparison; ConfigError if not."""
    if comparison.initial is None:
        runs = comparison.runs
    elif todo(comparison.initial) is Todo.NOTHING:
        if not (comparison.policy / CONFIG).is_file():
            return  # is exported again, after which each run is checked
        runs = _with_policy(comparison)
    else:
        for path in comparison.made():
            raise ConfigError(
                f"{path} holds a run, but {comparison.initial.run_dir}, which made the policy that "
                "it started from, is not complete; give the comparison another name, or start it "
                "anew with --overwrite"
            )
        return
    for planned in runs:
        todo(planned.config)


# --------------------------------------------------------------------------- the runs


def _from_one_policy(comparison: Comparison) -> tuple[Planned, ...]:
    """Let the runs start from the same policy, which is made if it isn't there; return them."""
    initial = comparison.initial
    if initial is None:
        return comparison.runs
    if todo(initial) is not Todo.NOTHING:
        _remove_policy(comparison)
        logger.info("the policy that all runs start from:", extra=STDOUT)
        _train(initial, todo(initial))
    if not (comparison.policy / CONFIG).is_file():
        from proma_megatron.commands.export import command as job
        from proma_megatron.runs.policies import open_policy

        job.export(open_policy(initial.run_dir), comparison.policy, None, "5GB")
    return _with_policy(comparison)


def _with_policy(comparison: Comparison) -> tuple[Planned, ...]:
    """Return the runs with the policy of ``initial``, which is there."""
    assert comparison.initial is not None
    tokenizer = RunDir(comparison.initial.run_dir).own_tokenizer
    if tokenizer is None:
        raise ConfigError(
            f"{comparison.initial.run_dir} has lost its tokenizer; start anew with --overwrite"
        )
    return tuple(
        Planned(run.algorithm, started_from(run.config, comparison.policy, tokenizer))
        for run in comparison.runs
    )


def _remove_policy(comparison: Comparison) -> None:
    shutil.rmtree(comparison.policy, ignore_errors=True)


def _make_all(comparison: Comparison, runs: tuple[Planned, ...], command: str) -> None:
    left = {planned.label: todo(planned.config) for planned in runs}
    clock = _Clock(sum(state is not Todo.NOTHING for state in left.values()))
    for number, planned in enumerate(runs, start=1):
        state = left[planned.label]
        place = f"run {number} of {len(runs)}: {planned.label}"
        if state is Todo.NOTHING:
            logger.info(f"{place}, {state.value}", extra=STDOUT)
            continue
        told = place if state is Todo.START else f"{place}, {state.value}"
        logger.info(told, extra=STDOUT)
        _train(planned.config, state)
        draw_comparison(comparison, command)
        logger.info(f"{place}, done {clock.tick()}", extra=STDOUT)


def _train(config: RunConfig, state: Todo) -> None:
    from proma_megatron.commands.train import (
        command as launcher,  # imports torch and Megatron: seconds
    )

    launcher.train(config, resume=state is Todo.RESUME, overwrite=state is Todo.RESTART)


class _Clock:
    """Time of the runs so far, and what it says of the others."""

    def __init__(self, runs: int) -> None:
        self._runs, self._done = runs, 0
        self._started = time.monotonic()

    def tick(self) -> str:
        """Count a run that is finished."""
        self._done += 1
        elapsed = time.monotonic() - self._started
        ahead = elapsed / self._done * (self._runs - self._done)
        return f"after {duration(elapsed)}; about {duration(ahead)} left"
