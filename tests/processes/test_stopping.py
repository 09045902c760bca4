"""Runs that stop early: who may ask, when the time is up, and what is left behind."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.command import ROOT
from support.pool import WorkerPool
from support.stopping import agreement, waiting_seconds

from proma_megatron import cli
from proma_megatron.config.model import ParallelConfig
from proma_megatron.config.trainer import ProcessConfig
from proma_megatron.errors import RunStopped
from proma_megatron.processes.elastic import start_ranks
from proma_megatron.processes.failures import LAUNCHED
from proma_megatron.processes.signals import Forwarder
from proma_megatron.processes.stopping import (
    StopAgreement,
    StopSignals,
    read_stop,
    run_clock_start,
    start_run_clock,
    write_stop,
)

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a rank of torchrun; signals and environment are put back."""
    for name in (LAUNCHED, "OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "PROMA_STARTED"):
        monkeypatch.setenv(name, "1")
        monkeypatch.delenv(name)
    numbers = (*HANDLED, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# --------------------------------------------------------------------------- signals of a rank


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_is_noted_and_the_first_one_counts(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in HANDLED]
    with StopSignals() as signals:
        assert signals.reason is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.reason == number.name
    assert [signal.getsignal(each) for each in HANDLED] == before


def test_a_second_interrupt_ends_the_process_even_where_python_does_not_run() -> None:
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_our_launchers_sigterm_ends_a_rank_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAUNCHED, "1")
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert signal.getsignal(signal.SIGTERM) == before
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.reason == "SIGUSR1"


def test_outside_the_main_thread_nothing_is_handled() -> None:
    seen: list[Any] = []

    def look() -> None:
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGUSR1))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGUSR1)]


# --------------------------------------------------------------------------- the time limit


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def alone(clock: Clock, minutes: float | None) -> StopAgreement:
    topology: Any = SimpleNamespace(world_size=1, is_main=True)
    return StopAgreement(topology, StopSignals(), minutes, started=clock.now, clock=clock)


def test_a_step_that_would_end_too_late_is_not_begun() -> None:
    clock = Clock()
    stops = alone(clock, minutes=1)
    for seconds in (20.0, 5.0):  # the longest counts
        with stops.step():
            clock.now += seconds
    stops.note_save(4.0)
    clock.now += 4.0
    assert stops.time_left() == 31
    clock.now += 7.0
    assert stops.agreed() is None  # 24 s left for 20 + 4
    clock.now += 0.5
    assert stops.agreed() == "trainer.max_minutes=1"
    clock.now -= 30
    assert stops.agreed() == "trainer.max_minutes=1"


def test_a_step_that_has_begun_goes_on_until_only_a_save_fits() -> None:
    clock = Clock()
    stops = alone(clock, minutes=1)
    stops.note_save(10.0)
    clock.now += 10.0
    with stops.step():
        clock.now += 20.0
    with stops.step():
        for _ in range(4):
            clock.now += 5.0
            assert stops.agreed() is None  # what is left of it and a save fit
        clock.now += 1.0
        assert stops.agreed() is not None  # 9 s left


def test_without_a_limit_nothing_is_late() -> None:
    clock = Clock()
    stops = alone(clock, minutes=None)
    with stops.step():
        clock.now += 1e9
    assert stops.agreed() is None
    assert stops.time_left() == float("inf")


def test_the_minutes_begin_with_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    own = run_clock_start()
    assert own < time.monotonic()
    start_run_clock()
    assert run_clock_start() == own  # a rank of torchrun
    monkeypatch.setenv(LAUNCHED, "1")
    assert 0 <= time.monotonic() - run_clock_start() < 5


# --------------------------------------------------------------------------- of one mind

TERM = "SIGTERM"
LIMIT = "trainer.max_minutes=1"


@pytest.mark.parametrize(
    ("parallel", "asked", "late", "answers"),
    [
        (ParallelConfig(tensor=2), 1, None, [[TERM, TERM, None, TERM]] * 2),
        (ParallelConfig(), 1, None, [[None, TERM, None, TERM], [TERM, TERM, None, TERM]]),
        (ParallelConfig(tensor=2), None, 0, [[LIMIT] * 4] * 2),  # time that is up stays so
        (ParallelConfig(tensor=2), None, 1, [[None] * 4] * 2),
        (ParallelConfig(tensor=2), 1, 0, [[LIMIT] * 4] * 2),
    ],
    ids=["tensor", "replicas", "time", "another rank's time", "both"],
)
def test_all_ranks_give_the_same_reason(
    workers: WorkerPool,
    parallel: ParallelConfig,
    asked: int | None,
    late: int | None,
    answers: list[list[str | None]],
) -> None:
    assert workers.run(2, agreement, parallel=parallel, asked=asked, late=late) == answers


def test_every_group_waits_as_long_as_the_configuration_says(workers: WorkerPool) -> None:
    parallel = ParallelConfig(tensor=1, pipeline=2)
    for found in workers.run(2, waiting_seconds, parallel=parallel, minutes=1.75):
        assert found == {105.0}


# --------------------------------------------------------------------------- what is left behind


def test_a_stopped_run_says_so_and_leaves_it_for_the_launcher(tmp_path: Path) -> None:
    assert read_stop(tmp_path) is None
    saved = Path("runs/x/checkpoints/step_000012")
    stop = pickle.loads(pickle.dumps(RunStopped("SIGTERM", 12, saved)))
    write_stop(stop, tmp_path)
    sentence = (
        "stopped by SIGTERM after step 12; runs/x/checkpoints/step_000012 is complete, --resume "
        "goes on from there"
    )
    assert str(stop) == sentence == str(read_stop(tmp_path))
    write_stop(RunStopped("SIGINT", 0, None), tmp_path)
    assert "nothing is saved yet" in str(read_stop(tmp_path))


def test_the_command_ends_with_75(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stops(*_: Any, **__: Any) -> None:
        raise RunStopped("SIGTERM", 3, Path("there"))

    monkeypatch.setattr("proma_megatron.commands.train.command.train", stops)
    config = tmp_path / "config.yaml"
    config.write_text("name: x\n")
    monkeypatch.setattr(sys, "argv", ["proma", "train", str(config)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 75
    assert capsys.readouterr().err == f"{RunStopped('SIGTERM', 3, Path('there'))}\n"


@pytest.mark.parametrize(
    ("flags", "there", "asked"),
    [
        (["--resume-or-start"], True, {"resume": True, "overwrite": False}),
        (["--resume-or-start"], False, {"resume": False, "overwrite": True}),
        (["--resume-or-start", "--resume"], False, "can't be combined with --resume; choose one"),
        (["--resume-or-start", "--overwrite"], True, "can't be combined with --overwrite; choose"),
    ],
)
def test_the_same_command_starts_a_run_and_goes_on_with_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    there: bool,
    asked: dict[str, bool] | str,
) -> None:
    calls: list[dict[str, bool]] = []
    monkeypatch.setattr(
        "proma_megatron.commands.train.command.train", lambda _, **flags: calls.append(flags)
    )
    monkeypatch.setattr("proma_megatron.runs.directory.resumes", lambda path: there)
    config = tmp_path / "config.yaml"
    config.write_text("name: x\n")
    monkeypatch.setattr(sys, "argv", ["proma", "train", str(config), *flags])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr().err
    if isinstance(asked, str):
        assert left.value.code == 2
        assert asked in said
        assert said.count("\n") == 1
        assert not calls
    else:
        assert left.value.code == 0
        assert calls == [asked]


# --------------------------------------------------------------------------- the launcher

LISTENS_LATER = """
import signal, sys, time
time.sleep(0.5)
seen = []
signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
while not seen:
    time.sleep(0.01)
time.sleep(0.5)
sys.exit(len(seen))
"""


@pytest.mark.ranks
def test_a_rank_is_told_once_and_not_before_it_listens() -> None:
    """Until it has its handlers, SIGUSR1 would end it."""
    with Forwarder() as forwarder:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        rank = subprocess.Popen(
            [sys.executable, "-c", LISTENS_LATER, "proma_megatron.processes.entry"]
        )
        assert rank.wait(20) == 1
    assert forwarder.request == "SIGTERM"


RANK = """
import os, signal, sys, time
from pathlib import Path
from proma_megatron.errors import WorkerError
from proma_megatron.processes.failures import fail
from proma_megatron.errors import RunStopped
from proma_megatron.processes.stopping import StopSignals, write_stop

def main(arguments):
    what, logs, rank = arguments[0], Path(arguments[1]), os.environ["RANK"]
    (logs / f"pid{rank}").write_text(str(os.getpid()))
    if what == "stop":
        with StopSignals() as signals:
            (logs / f"ready{rank}").touch()
            while signals.reason is None:
                time.sleep(0.02)
        if rank == "0":
            write_stop(RunStopped(signals.reason, 7, Path("there")), logs)
        return
    if rank == "0":  # hangs, as a rank does whose machine is in trouble
        os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        stat = Path("/proc", (logs / "pid0").read_text() or "1", "stat")
        if ") T " in stat.read_text():
            break
        time.sleep(0.05)
    (logs / "died").write_text(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Starts two ranks of the module above."""
    (tmp_path / "a_rank.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))

    def start(what: str) -> None:
        (tmp_path / "pid0").touch()
        start_ranks(
            "a_rank",
            [what, str(tmp_path)],
            count=2,
            name="ranks",
            logs=tmp_path,
            process=ProcessConfig(),
            graceful=True,
        )

    return start


@pytest.mark.ranks
def test_a_dead_rank_is_named_and_a_peer_that_does_not_react_ends_within_seconds(
    tmp_path: Path, ranks: Any
) -> None:
    with pytest.raises(Exception, match=r"rank 1 was ended by signal 9 \(SIGKILL"):
        ranks("die")
    assert time.monotonic() - float((tmp_path / "died").read_text()) < 10
    assert not Path("/proc", (tmp_path / "pid0").read_text()).exists()


@pytest.mark.ranks
def test_the_launcher_asks_its_ranks_and_gives_the_reason_that_it_had(
    tmp_path: Path, ranks: Any
) -> None:
    write_stop(RunStopped("SIGUSR1", 1, None), tmp_path)  # an earlier attempt's

    def ask() -> None:
        while not (tmp_path / "ready1").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(RunStopped) as stopped:
        ranks("stop")
    assert stopped.value.reason == "SIGTERM"
    assert stopped.value.step == 7
    assert str(read_stop(tmp_path)) == str(stopped.value)


ORPHAN = """
import os, subprocess, sys, time
program = "from proma_megatron.processes.entry import end_with_launcher; import time; " \\
          "end_with_launcher(); print('here', flush=True); time.sleep(60)"
os.environ["PROMA_LAUNCHER"] = str(os.getpid())
rank = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
rank.stdout.readline()
print(rank.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.ranks
def test_ranks_do_not_outlive_their_launcher() -> None:
    launcher = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, cwd=ROOT)
    assert launcher.stdout is not None
    rank = Path("/proc", launcher.stdout.readline().decode().strip(), "stat")
    assert rank.exists()
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 5
    while rank.exists() and ") Z " not in rank.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
