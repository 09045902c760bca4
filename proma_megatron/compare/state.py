"""How far each run of a comparison is, and what is to be done about it."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Any

import yaml

from proma_megatron.config import ConfigError, RunConfig
from proma_megatron.config_file import dump_config, read_tree
from proma_megatron.run_dir import RunDir

_ABSENT = "not there"


class Todo(enum.Enum):
    NOTHING = "is finished"
    RESUME = "continues from its newest checkpoint"
    RESTART = "starts again, since it has no checkpoint to continue from"
    START = "starts"


def todo(config: RunConfig) -> Todo:
    """What is left of this run.

    Raises:
        ConfigError: the directory holds a run of another configuration.
    """
    run_dir = RunDir(config.run_dir)
    if not run_dir.holds_run:
        return Todo.START
    _check_same(run_dir, config)
    newest = run_dir.latest_checkpoint()
    if newest == run_dir.checkpoint(config.trainer.steps):
        return Todo.NOTHING
    # Megatron-Core 0.19 can't load the state of its distributed optimizer, so train refuses to.
    if newest is None or config.optimizer.distributed:
        return Todo.RESTART
    return Todo.RESUME


def _check_same(run_dir: RunDir, config: RunConfig) -> None:
    """Whether the run there is of this configuration; ConfigError if not."""
    there = dict(_flat(read_tree(run_dir.config)))
    wanted = dict(_flat(yaml.safe_load(dump_config(config))))
    for key in (*wanted, *there):
        old, new = there.get(key, _ABSENT), wanted.get(key, _ABSENT)
        if old != new:
            raise ConfigError(
                f"{run_dir.path} holds a run with {key}={old}, but this comparison has "
                f"{key}={new}; give it another name, or start it anew with --overwrite"
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
