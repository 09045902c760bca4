"""What the ranks of one `proma export` are told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from proma_megatron.config.fields import Section
from proma_megatron.config.run import RunConfig

Dtype = Literal["float64", "float32", "float16", "bfloat16"]


class ExportJob(Section):
    """Weights of one checkpoint, written to a directory that is there."""

    config: RunConfig
    checkpoint: Path
    vocab_size: int
    dtype: Dtype
    shard_size: str  # largest file, as huggingface_hub spells sizes
    out: Path
