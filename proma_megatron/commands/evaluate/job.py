"""What the ranks of one `proma eval` are told."""

from __future__ import annotations

from pathlib import Path

from proma_megatron.config.fields import Section
from proma_megatron.config.run import RunConfig


class EvaluationJob(Section):
    """One evaluation of one policy on one file of problems."""

    config: RunConfig
    checkpoint: Path | None  # None: the weights are those of config.model.path
    data: Path
    out: Path  # JSONL, one completion a line
