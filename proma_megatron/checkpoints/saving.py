"""Write checkpoints while training goes on.

A save has three parts. On all ranks, while training waits: decide who writes what and copy the
tensors. In a thread of each rank, beside training: write and sync this rank's files, and sum them
up. On all ranks again, at a moment when they are in step: write the index, check that every rank
was well, sync, and only then the marker, the links and the removal of what is no longer wanted.

Megatron offers a process for the second part. A forked one inherits CUDA and Gloo threads, and one
that is spawned imports this program once more; a thread needs neither, and gives Python's lock away
while it writes.
"""

from __future__ import annotations

import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy

from proma_megatron.checkpoints.sharded import Contents, copied, shards
from proma_megatron.distributed.topology import Topology
from proma_megatron.errors import StorageError
from proma_megatron.files import size_and_checksum, sync_file, sync_folder, why
from proma_megatron.runs.checkpoint_folder import (
    BEST,
    LATEST,
    MARKER,
    Marker,
    best,
    expendable,
    newest,
    point,
    remove,
    write_marker,
)

# It would tell every user to install another package for what a thread does here.
torch_strategy._logged_mcore_async_deprecation = True


_LOOK_SECONDS = 0.05  # between two looks at whether all ranks have written


@dataclass(frozen=True)
class Retention:
    """Which complete checkpoints stay; `folder.expendable` says how."""

    keep_last: int | None = None
    keep_best: int = 0


@dataclass
class _Running:
    """The save that is under way on this rank."""

    path: Path
    marker: Marker
    request: Any  # Megatron's: what to write, and what to do when all ranks have
    started: float
    thread: threading.Thread = field(init=False)
    blocked: float = 0.0  # seconds that training has waited for it
    # What the thread leaves.
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    failure: str | None = None
    written: float = 0.0  # when it was done


@dataclass(frozen=True)
class SaveReport:
    """A checkpoint that has become complete."""

    path: Path
    blocked: float  # seconds that training waited
    seconds: float  # that it took, but for those in which the marker waited for a step to end
    size: int  # bytes
    trouble: str = ""  # after it was complete

    def __str__(self) -> str:
        return (
            f"saved {self.path} ({self.size / 2**20:,.1f} MiB; training waited "
            f"{self.blocked:.2f} of {self.seconds:.2f} s){self.trouble}"
        )


class Saver:
    """A writer of one checkpoint at a time. Every rank has one and makes the same calls in step.

    Args:
        folder: of the run's checkpoints.
        background: whether training goes on while files are written.
        saved: told of each checkpoint that has become complete.
    """

    def __init__(
        self,
        topology: Topology,
        folder: Path,
        retention: Retention,
        *,
        background: bool,
        saved: Callable[[SaveReport], None] = lambda _: None,
    ) -> None:
        self.topology, self.folder, self.retention = topology, folder, retention
        self.background, self.saved = background, saved
        self._running: _Running | None = None

    @property
    def current(self) -> str | None:
        """The name of the checkpoint that is under way; the same on all ranks."""
        return None if self._running is None else self._running.path.name

    @property
    def busy(self) -> bool:
        """Whether files of a checkpoint are still being written, on this rank."""
        return self._running is not None and self._running.thread.is_alive()

    def save(self, name: str, contents: Contents, marker: Marker) -> None:
        """Begin a checkpoint, or write it to its end if saves are not in the background.

        The tensors may be changed as soon as this returns. One that is under way is completed
        first.

        Raises:
            StorageError: it can't be written. What was there of it is gone, the others are not.
        """
        self.finish()
        started = time.monotonic()
        path = self.folder / name
        self._on_main(path, lambda: _empty(path))
        with self.topology.megatron_calls():
            # The writer's results need no queue between processes, for which Megatron would start
            # a manager: a process that imports this program once more, 10 s of a core per rank.
            filesystem_async._results_queue = queue.Queue()  # type: ignore[assignment]
            request: Any = dist_checkpointing.save(
                copied(shards(contents, loading=False)),
                str(path),
                async_sharded_save=True,
                async_strategy="mcore",
            )
            staged = request.preload_fn() if request.preload_fn is not None else None
        run = _Running(path, marker, request, started)
        run.thread = threading.Thread(
            target=_write, args=(run, staged, self.topology.rank), name="checkpoint", daemon=True
        )
        run.thread.start()
        self._running = run
        run.blocked = time.monotonic() - started
        if not self.background:
            self.finish()

    def finish(self) -> None:
        """Complete the checkpoint that is under way, if there is one; waits for the files.

        Raises:
            StorageError: as `save`.
        """
        run, self._running = self._running, None
        if run is None:
            return
        waited = time.monotonic()
        # Some ranks write more than others, longer than a collective may wait.
        while any(self.topology.gather_over_all(run.thread.is_alive())):
            time.sleep(_LOOK_SECONDS)
        run.thread.join()
        files = self._agreed(run)
        try:
            with self.topology.megatron_calls():
                for finalize in run.request.finalize_fns:
                    finalize()
        except OSError as error:  # rank 0 alone writes here; it ends, and the others with it
            remove(run.path)
            raise StorageError(self._refused(run.path, error)) from None
        self._on_main(run.path, lambda: self._complete(run, files))
        trouble = self._tidy() if self.topology.is_main else ""
        done = time.monotonic()
        self.saved(
            SaveReport(
                run.path,
                blocked=run.blocked + done - waited,
                seconds=run.written - run.started + done - max(waited, run.written),
                size=sum(size for size, _ in files.values()),
                trouble=trouble,
            )
        )

    def _agreed(self, run: _Running) -> dict[str, tuple[int, int]]:
        """Gather sizes and checksums of all ranks' files; StorageError on all if one failed."""
        problem = None
        if run.failure is not None:
            problem = self._refused(run.path, OSError(0, run.failure))
        found = self.topology.gather_over_all((problem, run.files))
        first = next((text for text, _ in found if text is not None), None)
        if first is not None:
            if self.topology.is_main:
                remove(run.path)
            self.topology.barrier()
            raise StorageError(first)
        return {name: sums for _, files in found for name, sums in files.items()}

    def _complete(self, run: _Running, files: dict[str, tuple[int, int]]) -> None:
        """Take the last steps on rank 0, in an order that a crash can't turn into a loss."""
        path = run.path
        for file in path.iterdir():
            if file.name not in files and file.name != MARKER:  # the index
                sync_file(file)
                files[file.name] = size_and_checksum(file)
        sync_folder(path)
        sync_folder(self.folder)
        write_marker(path, replace(run.marker, files=files))

    def _tidy(self) -> str:
        """Set the links, then remove what may go, on rank 0; return what went wrong, "" if nothing.

        The checkpoint is there, whatever becomes of this.
        """
        try:
            go = expendable(self.folder, self.retention.keep_last, self.retention.keep_best)
            point(self.folder, LATEST, newest(self.folder))
            point(self.folder, BEST, best(self.folder, without=go))
            for old in go:
                remove(old)
        except (OSError, StorageError) as error:
            return f"; its links and the removal of older ones failed: {error}"
        return ""

    def _on_main(self, path: Path, action: Callable[[], None]) -> None:
        """Do something with the disk on rank 0; StorageError on every rank if it can't be done."""

        def on_main() -> None:
            if not self.topology.is_main:
                return
            try:
                action()
            except OSError as error:
                remove(path)
                raise StorageError(self._refused(path, error)) from None

        self.topology.agree(on_main)

    def _refused(self, path: Path, error: OSError) -> str:
        kept = newest(self.folder)
        way = f"{kept.name} is complete, --resume goes on from there" if kept else "start again"
        return (
            f"checkpoint {path} can't be written ({why(error, path)}), expected a disk that takes "
            f"it; make room or mend the disk: {way}"
        )


def _write(run: _Running, staged: Any, rank: int) -> None:
    """Write this rank's files in the thread, synced, and their checksums."""
    complaints = _Complaints()
    try:
        request = run.request
        if request.async_fn is not None:
            arguments = list(request.async_fn_args)
            if staged is not None:
                arguments[1] = staged
            with complaints.heard():
                request.async_fn(*arguments, **request.async_fn_kwargs)
        for file in sorted(run.path.glob(f"__{rank}_*")):
            run.files[file.name] = size_and_checksum(file)
    except BaseException as error:  # told on the main thread, on all ranks together
        run.failure = str(error)
    if complaints.texts:
        run.failure = complaints.texts[0]
    run.written = time.monotonic()


def _empty(path: Path) -> None:
    """Make a new folder, in place of what an earlier attempt left."""
    if path.exists():
        remove(path)
        if path.exists():
            shutil.rmtree(path)
    path.mkdir(parents=True)


class _Complaints(logging.Handler):
    """What Megatron's writer says of a write that failed; its exceptions name the type alone."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        mark = "encountered an error: "
        text = record.getMessage()
        if mark in text:
            self.texts.append(text.partition(mark)[2])

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Keep them here within the ``with`` block, and off the terminal."""
        logger, passed_on = filesystem_async.logger, filesystem_async.logger.propagate
        logger.addHandler(self)
        logger.propagate = False
        try:
            yield
        finally:
            logger.propagate = passed_on
            logger.removeHandler(self)
