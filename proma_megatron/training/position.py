"""The record of where a run stands between two steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Position:
    """Where a run stands between two steps, apart from tensors; JSON in a checkpoint's marker."""

    phase: str = "warm_start"  # or "rl"
    step: int = 0  # of the phase; so many are done
    prompts: Mapping[str, int] = field(default_factory=dict)  # the stream of RL's prompts
    demonstrations: Mapping[str, Any] = field(default_factory=dict)  # that of the warm start
    kl_coefficient: float = 0.0
    lagged: int = 0  # weights in the running mean
    joined: bool = False  # the current ones are among them
    skipped: int = 0  # steps in a row without any update, see `trainer.max_skipped_steps`
    files: Mapping[str, int] = field(default_factory=dict)  # bytes of what is reported step by step
    # The step's row, where validation is still to come.
    pending: Mapping[str, Any] | None = None
