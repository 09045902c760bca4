"""Run an experiment's stages on this machine, and stop them with everything saved."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import psutil

from proma_megatron.launching.experiments import build
from proma_megatron.launching.scripts import ASKED_TO_STOP
from proma_megatron.launching.stages import Stage


def run_here(title: str, stages: Sequence[Stage]) -> dict[str, str]:
    """Run stages on this machine to their end, with what they print on standard output.

    SIGTERM and a first Ctrl-C are for the ranks, which save and stop; a second one ends them.

    Returns:
        What became of each: "SUCCEEDED", or another of TorchX's states.

    Raises:
        ConfigError: see `build`.
    """
    with (
        build(title, stages, None) as experiment,
        _stops_for_the_ranks(Path(experiment._exp_dir)),
    ):
        experiment.run(tail_logs=True)
    return {job.id: job.state.name for job in experiment.jobs}


@contextlib.contextmanager
def _stops_for_the_ranks(folder: Path) -> Iterator[None]:
    """Pass signals to this process on to all that it has started, within the ``with`` block.

    Stages that have not begun look into the experiment's folder.

    NeMo-Run starts each stage in a session of its own, which no terminal reaches, and waits for it
    in a way that Ctrl-C doesn't interrupt.
    """
    asked = False

    def tell(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        how, asked = signal.SIGKILL if asked else signal.SIGTERM, True
        with contextlib.suppress(OSError):  # nothing has begun
            (folder / ASKED_TO_STOP).touch()
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(how)

    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
