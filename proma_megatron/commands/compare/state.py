"""How far each run of a comparison is, and what is to be done about it."""

from __future__ import annotations

import enum

import yaml

from proma_megatron.config.loading import differences, dump_config, read_tree
from proma_megatron.config.run import RunConfig
from proma_megatron.errors import ConfigError
from proma_megatron.runs.checkpoint_folder import read_marker
from proma_megatron.runs.directory import RunDir


class Todo(enum.Enum):
    NOTHING = "is finished"
    RESUME = "continues from its newest checkpoint"
    RESTART = "starts again, since it has no checkpoint to continue from"
    START = "starts"


def todo(config: RunConfig) -> Todo:
    """Return what is left of this run.

    Raises:
        ConfigError: the directory holds a run of another configuration.
    """
    run_dir = RunDir(config.run_dir)
    if not run_dir.holds_run:
        return Todo.START
    _check_same(run_dir, config)
    newest = run_dir.latest_checkpoint()
    if newest is None:
        return Todo.RESTART
    last = run_dir.checkpoint(config.trainer.steps)
    whole = newest == last and read_marker(newest).state.get("pending") is None
    return Todo.NOTHING if whole else Todo.RESUME


def _check_same(run_dir: RunDir, config: RunConfig) -> None:
    """Check that the run there is of this configuration; ConfigError if not."""
    wanted = yaml.safe_load(dump_config(config))
    for key, old, new in differences(read_tree(run_dir.config), wanted):
        raise ConfigError(
            f"{run_dir.path} holds a run with {key}={old}, but this comparison has "
            f"{key}={new}; give it another name, or start it anew with --overwrite"
        )
