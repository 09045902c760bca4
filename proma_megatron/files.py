"""Files written whole or not at all, and what a disk refuses, in words."""

from __future__ import annotations

import errno
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

from proma_megatron.errors import ConfigError, StorageError

_CHUNK = 16 * 2**20  # bytes read at a time


def write_synced(path: Path, text: str) -> None:
    """Write a file with this text, in place of what was there; a crash leaves the one or the other.

    It is on the disk when this returns, and so is its name.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Let the names in a folder reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems can't
            raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Let a file's content reach the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def size_and_checksum(path: Path) -> tuple[int, int]:
    """Return the bytes of a file, and their CRC-32. It finds decay and truncation, not forgery."""
    size, checksum = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return size, checksum


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say in one sentence why the ``with`` block can't write to this path, or beside it.

    Raises:
        StorageError: the disk does not take it.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{error.filename or path} can't be written ({why(error, path)}), expected a disk that "
            "takes it; make room or mend the disk, then --resume goes on from the newest checkpoint"
        ) from None


def why(error: OSError, path: Path) -> str:
    """Put an operating system's refusal in words, with the room that is left where that matters."""
    reason = error.strerror or str(error)
    try:
        found = os.statvfs(_existing(path))
    except OSError:
        return reason
    free = found.f_bavail * found.f_frsize
    if free < 64 * 2**20:
        reason += f"; {free / 2**20:,.1f} MiB are free there"
    return reason


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def check_output(path: Path, inputs: Iterable[Path]) -> None:
    """Check that a file can be written there, without loss of what is read; ConfigError if not."""
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
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a name to write to, which becomes ``path`` at the end; an error leaves nothing.

    Other processes, also on other nodes, may write the same file meanwhile: the last one stays.
    """
    path = path.resolve()  # a link stays a link
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_once(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all, and that nobody replaces afterwards."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        part.write_text(text)
        with suppress(FileExistsError):
            os.link(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file of these rows, in place of what ``path`` held."""
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        for row in rows:
            append_row(file, row)


def append_row(file: TextIO, row: Mapping[str, Any]) -> None:
    file.write(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n")
    file.flush()


def _finite(value: Any) -> Any:
    """Return ``value`` with every NaN and infinity in it replaced by None."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
