"""What commands that run once leave behind: one complete result, or nothing."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from proma_megatron.config.sections import ConfigError
from proma_megatron.processes.failures import StoppedError, WorkerError

SUMMARY = "summary.json"  # in the folder of a job: what was run, and what came out


def check_output(path: Path, inputs: Iterable[Path]) -> None:
    """Whether a file can be written there, without loss of what is read; ConfigError if not."""
    if path.is_dir():
        raise ConfigError(f"--out is {path}, which is a directory; give the name of a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"--out is {path}, but there is no directory {path.parent}; make it")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--out is {path}, but {path.parent} is not writable; choose another")
    if path.exists() and not path.is_file():
        raise ConfigError(f"--out is {path}, which is no ordinary file; give another name")
    for source in inputs:
        if path.exists() and path.samefile(source):
            raise ConfigError(f"--out is {path}, which is also read; give another name")


@contextmanager
def working_folder(purpose: str) -> Iterator[Path]:
    """A temporary folder; what ranks printed is kept in it if one of them failed."""
    folder = Path(tempfile.mkdtemp(prefix=f"proma-{purpose}-"))
    try:
        yield folder
    except BaseException as error:
        if isinstance(error, WorkerError) and not isinstance(error, StoppedError):
            for tensors in folder.rglob("*.safetensors"):
                tensors.unlink()
            print(f"what the ranks printed is in {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


@contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes ``path`` at the end; nothing is left after an error."""
    path = path.resolve()  # a link stays a link
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
