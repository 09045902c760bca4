"""Files that must survive: written completely, synced to the disk, and found whole again."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from proma_megatron.errors import RunError

_CHUNK = 16 * 2**20  # bytes read at a time


class StorageError(RunError):
    """The disk does not take, or no longer holds, what the run needs; the message names the file
    and is complete."""


def write_synced(path: Path, text: str) -> None:
    """A file with this text, in place of what was there, or what was there: nothing between.

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
    """Bytes of a file, and their CRC-32. It finds decay and truncation, not forgery."""
    size, checksum = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return size, checksum


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Within the ``with`` block a run writes to this path, or beside it.

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
    """An operating system's refusal in words, with the room that is left where that matters."""
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
