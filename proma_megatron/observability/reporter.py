"""What the world sees of a run: rank 0 writes and shows, the other ranks keep quiet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from proma_megatron.observability.metrics import MetricsWriter
from proma_megatron.observability.terminal import Display
from proma_megatron.runs.directory import RunDir
from proma_megatron.types import StepReport


class Reporter(Protocol):
    def start(self, phase: str, total: int, completed: int = 0) -> None: ...

    def write(self, report: StepReport, phase: str) -> None: ...

    def message(self, text: str) -> None: ...

    def written(self) -> dict[str, int]: ...

    def sync(self) -> None: ...

    def rewind(self, written: Mapping[str, int]) -> None: ...

    def close(self) -> None: ...


class NullReporter:
    """The reporter of every rank but the first."""

    def start(self, phase: str, total: int, completed: int = 0) -> None:
        pass

    def write(self, report: StepReport, phase: str) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def written(self) -> dict[str, int]:
        return {}

    def sync(self) -> None:
        pass

    def rewind(self, written: Mapping[str, int]) -> None:
        pass

    def close(self) -> None:
        pass


class RunReporter:
    """Files of the run directory, and the terminal."""

    def __init__(self, name: str, run_dir: RunDir, steps: int) -> None:
        self._writer = MetricsWriter(run_dir)
        self._display = Display(name, steps)

    def start(self, phase: str, total: int, completed: int = 0) -> None:
        self._display.start(phase, total, completed)

    def write(self, report: StepReport, phase: str) -> None:
        self._writer.write(report, phase)
        self._display.update(report.step, report.metrics)

    def message(self, text: str) -> None:
        self._display.message(text)

    def written(self) -> dict[str, int]:
        """Return the bytes of each file that grows step by step."""
        return self._writer.written()

    def sync(self) -> None:
        """Let those files reach the disk."""
        self._writer.sync()

    def rewind(self, written: Mapping[str, int]) -> None:
        """Forget what was reported after that."""
        for lost in self._writer.rewind(written):
            self._display.message(lost)

    def close(self) -> None:
        self._display.stop()
        self._writer.close()
