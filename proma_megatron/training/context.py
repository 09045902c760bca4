"""What the stages of a run share: where it runs, its clocks, whom it tells, and when it stops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from proma_megatron.config.run import RunConfig
from proma_megatron.distributed.topology import Topology
from proma_megatron.observability.profiler import Profiler
from proma_megatron.observability.reporter import Reporter
from proma_megatron.observability.timing import Stopwatch
from proma_megatron.processes.stopping import StopAgreement
from proma_megatron.processes.watchdog import Phases
from proma_megatron.runs.directory import RunDir


class Stopping(Exception):  # noqa: N818 - no error
    """All ranks have agreed to stop."""


@dataclass(frozen=True)
class StepContext:
    """Handed to every stage of a run on this rank; `Progress` adds where the run stands.

    Attributes:
        phases: what a watchdog sees of the run.
        stopwatch: seconds of phases, for metrics.
        stops: whether the ranks have agreed to stop early.
    """

    config: RunConfig
    topology: Topology
    run_dir: RunDir
    reporter: Reporter
    phases: Phases
    profiler: Profiler
    stopwatch: Stopwatch
    stops: StopAgreement

    @classmethod
    def of(
        cls,
        config: RunConfig,
        topology: Topology,
        run_dir: RunDir,
        reporter: Reporter,
        phases: Phases,
        profiler: Profiler,
        stops: StopAgreement,
    ) -> StepContext:
        """Make one whose stopwatch tells watchdog and profiler of each phase that it times."""

        @contextmanager
        def watched(phase: str) -> Iterator[None]:
            with phases.phase(phase), profiler.phase(phase):
                yield

        stopwatch = Stopwatch(watch=watched)
        return cls(config, topology, run_dir, reporter, phases, profiler, stopwatch, stops)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Watch, profile and time this rank in this phase within the ``with`` block."""
        with self.stopwatch.phase(name):
            yield

    @contextmanager
    def setup(self) -> Iterator[None]:
        """Watch this rank as it gets ready within the ``with`` block, in no step's time."""
        with self.phases.phase("setup"):
            yield

    def interrupted(self) -> str | None:
        """Return why the ranks of this replica have agreed to stop, if so; they ask together."""
        return self.stops.agreed_within_replica()

    def say(self, text: str) -> None:
        """Tell the user, on rank 0."""
        self.reporter.message(text)
