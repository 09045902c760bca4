"""What the ranks of one `proma grads` or `proma verify` are told, and what they leave."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from proma_megatron.config import (
    ConfigError,
    GradientsConfig,
    ModelConfig,
    PositiveInt,
    Section,
)
from proma_megatron.failure import WorkerError


class GradientJob(Section):
    """One projected accumulation, without an optimizer step."""

    config: GradientsConfig
    model: ModelConfig  # its dtype and recompute are the configuration's
    vocab_size: PositiveInt
    weights: Path | None  # a Hugging Face directory; None: random, from the seed
    batch: Path  # as batching.batch_file reads it
    chains: PositiveInt = 1  # replicas whose chains this one replica runs, one after the other
    out: Path  # safetensors, by Hugging Face name
    summary: Path  # JSON: what was run, and its diagnostics


def check_output(path: Path) -> None:
    """Whether a file can be written there; ConfigError if not."""
    if path.is_dir():
        raise ConfigError(f"--out is {path}, which is a directory; give the name of a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"--out is {path}, but there is no directory {path.parent}; make it")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--out is {path}, but {path.parent} is not writable; choose another")


@contextmanager
def working_folder(purpose: str) -> Iterator[Path]:
    """A temporary folder; it is kept if a rank failed, for that rank's output is in it."""
    folder = Path(tempfile.mkdtemp(prefix=f"proma-{purpose}-"))
    try:
        yield folder
    except WorkerError:
        raise
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


@contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes ``path`` at the end; nothing is left after an error."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
