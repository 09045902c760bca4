"""What rank 0 reports: metrics.jsonl, samples.jsonl, TensorBoard, and seconds per phase."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from proma_megatron.errors import StorageError
from proma_megatron.files import append_row, disk_errors
from proma_megatron.runs.directory import RunDir

if TYPE_CHECKING:  # both take seconds to import, and reading metrics needs neither
    from torch.utils.tensorboard.writer import SummaryWriter

    from proma_megatron.types import StepReport


class MetricsWriter:
    """The files to which one process appends the reports of a run.

    A run that goes on from a checkpoint rewinds the files to it first, so that each step is there
    once.

    Raises:
        StorageError: from every method, where the disk does not take a row or the files are gone.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self._tensorboard_folder = run_dir.tensorboard
        self._paths = (run_dir.metrics, run_dir.samples)
        with self._on_disk():
            self._metrics = _open_for_append(run_dir.metrics)
            self._samples = _open_for_append(run_dir.samples)
        self._events: dict[str, SummaryWriter] = {}

    def write(self, report: StepReport, phase: str) -> None:
        """Write one step of ``phase``, "warm_start" or "rl".

        A row is ``{"step", "phase", **metrics}``. NaN and infinities become null, which JSON has
        no other word for. Phases count their steps separately, so each is a TensorBoard run.
        """
        place = {"step": report.step, "phase": phase}
        metrics = {key: float(value) for key, value in report.metrics.items()}  # NumPy's too
        self._check_there()
        with self._on_disk():
            append_row(self._metrics, {**place, **metrics})
            for sample in report.samples:
                append_row(self._samples, {**place, **sample})
            events = self._events_of(phase, report.step)
            for key, value in metrics.items():
                if math.isfinite(value):  # TensorBoard logs a warning for each one that is not
                    events.add_scalar(key, value, report.step)

    def written(self) -> dict[str, int]:
        """Return the bytes of each file, by its name."""
        return {path.name: os.fstat(file.fileno()).st_size for path, file in self._files()}

    def sync(self) -> None:
        """Let what was written reach the disk."""
        with self._on_disk():
            for _, file in self._files():
                os.fsync(file.fileno())

    def _files(self) -> Iterator[tuple[Path, TextIO]]:
        return zip(self._paths, (self._metrics, self._samples), strict=True)

    def rewind(self, written: Mapping[str, int]) -> list[str]:
        """Cut the files to what `written` once said; return what is missing, for the user."""
        missing = []
        with self._on_disk():
            for path, file in self._files():
                size = os.fstat(file.fileno()).st_size
                wanted = written.get(path.name, size)
                if size < wanted:
                    missing.append(
                        f"{path} has {size:,} bytes, {wanted:,} when the checkpoint was saved: "
                        "steps before it are missing there"
                    )
                file.truncate(min(size, wanted))
        return missing

    def close(self) -> None:
        """Flush and close every file; `write` may not be called afterwards.

        What the disk refuses now is nothing that a checkpoint counts on.
        """
        for file in (self._metrics, self._samples, *self._events.values()):
            with suppress(OSError):
                file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_there(self) -> None:
        for path in self._paths:
            if not path.exists():  # a row written to a removed file would be lost unnoticed
                raise StorageError(
                    f"{path} is gone, expected the file that the run writes to; bring its "
                    "directory back, then --resume goes on from the newest checkpoint"
                )

    def _on_disk(self) -> AbstractContextManager[None]:
        return disk_errors(self._paths[0])

    def _events_of(self, phase: str, step: int) -> SummaryWriter:
        if phase not in self._events:
            from torch.utils.tensorboard.writer import SummaryWriter

            # purge_step hides what an interrupted run had written from this step on.
            self._events[phase] = SummaryWriter(
                log_dir=str(self._tensorboard_folder / phase), purge_step=step, flush_secs=10
            )
        return self._events[phase]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl (or samples.jsonl) in file order.

    A last line that the run was killed in the middle of is dropped.

    Raises:
        ValueError: another line is no JSON object; the message has its number.
    """
    *lines, tail = path.read_bytes().split(b"\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        row = _parse_row(line)
        if row is None:
            raise ValueError(f"{path}, line {number} is not a JSON object; repair or remove it")
        rows.append(row)
    last = _parse_row(tail)
    return rows if last is None else [*rows, last]


def _parse_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode())
    except ValueError:  # includes UnicodeDecodeError
        return None
    return row if isinstance(row, dict) else None


def _open_for_append(path: Path) -> TextIO:
    """Open a JSONL file at its end, after a line break and without a half-written last line."""
    content = path.read_bytes() if path.exists() else b""
    complete, tail = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]
    if tail and _parse_row(tail) is not None:
        with path.open("ab") as file:
            file.write(b"\n")
    elif tail:
        os.truncate(path, len(complete))
    # A lone surrogate of a sampled text has no UTF-8; backslashreplace makes it a JSON escape.
    return path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")
