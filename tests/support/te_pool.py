"""Ranks with Transformer Engine's Python in them, which the other ranks of a session must not have.

Megatron takes what it finds of TE when it is imported, so these are processes of their own.
"""

from __future__ import annotations

import multiprocessing as mp
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from support import pool
from support.pool import WorkerPool, _serve

VERSION = "2.20.2"
FOLDER = Path(__file__).parents[2] / "build" / "transformer-engine"
COMMAND = (
    f"uv pip install --no-deps --target build/transformer-engine transformer-engine=={VERSION}"
)


def source() -> Path:
    """Where TE's Python lies, 9 MB without any library; skips the test where it doesn't."""
    if not (FOLDER / "transformer_engine" / "pytorch").is_dir():
        pytest.skip(f"Transformer Engine's Python source is not there; {COMMAND}")
    return FOLDER


def _serve_with_te(folder: Path, rank: int, device_type: str, port: int, pipe: Connection) -> None:
    from support import te_kernels

    warnings.simplefilter("ignore")
    te_kernels.install(folder)
    from transformer_engine.pytorch.quantization import (  # type: ignore[import-not-found]
        FP8GlobalStateManager,
    )

    release = pool._release_groups

    def released() -> None:
        # Delayed scaling would go on to reduce its maxima over the groups of an earlier layout.
        FP8GlobalStateManager.reset()
        release()

    pool._release_groups = released
    with te_kernels.on_cpu():
        _serve(rank, device_type, port, pipe)


class TransformerEnginePool(WorkerPool):
    """A pool whose ranks can build policies with ``model.backend=transformer_engine``."""

    def __init__(self, folder: Path) -> None:
        super().__init__("cpu")
        self._folder = folder

    def _start(self) -> None:
        ours, theirs = mp.Pipe()
        arguments = (self._folder, len(self._workers), "cpu", self._store.port, theirs)
        kind: Any = mp.get_context("spawn").Process
        process = kind(target=_serve_with_te, args=arguments, daemon=True)
        process.start()
        theirs.close()
        self._workers.append((process, ours))
