"""Ranks that tests fork from a loaded process: real processes, that fail as the launcher's do."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from proma_megatron.commands.train.command import train
from proma_megatron.config.loading import load_config
from proma_megatron.config.trainer import ProcessConfig
from proma_megatron.errors import WorkerError
from proma_megatron.processes.elastic import starting_ranks
from proma_megatron.runs.directory import RunDir
from support.forked import forked_start_ranks, start_ranks
from support.pooled import TINY_RUN, rl_rows

pytestmark = pytest.mark.ranks

SECONDS = 60.0  # until a test takes it that a rank hangs


def say_who() -> None:
    print(os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["OWN"], flush=True)


def say_what_was_inherited() -> None:
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    print(threads, torch.get_num_threads(), dist.is_initialized(), torch.cuda.is_initialized())


def wait(marker: Path) -> None:
    marker.with_suffix("." + os.environ["RANK"]).touch()
    time.sleep(SECONDS)


def meet_and_end(code: int) -> None:
    dist.init_process_group("gloo")
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(code * int(os.environ["RANK"]))


def await_files(*paths: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ranks_have_torchruns_variables_and_files_of_their_own(tmp_path: Path) -> None:
    with start_ranks(2, say_who, logs=tmp_path, env={"OWN": "set"}) as ranks:
        assert ranks.wait(SECONDS) == [0, 0]
    assert [path.read_text() for path in ranks.stdout] == ["0 2 set\n", "1 2 set\n"]


def test_ranks_begin_with_nothing_that_a_fork_would_break(tmp_path: Path) -> None:
    with start_ranks(1, say_what_was_inherited, logs=tmp_path) as ranks:
        assert ranks.wait(SECONDS) == [0]
    assert ranks.stdout[0].read_text() == "1 1 False False\n"


def test_ranks_meet_and_leave_their_exit_codes(tmp_path: Path) -> None:
    with start_ranks(2, meet_and_end, 3, logs=tmp_path) as ranks:
        assert ranks.wait(SECONDS) == [0, 3]


def test_stopped_and_killed_ranks(tmp_path: Path) -> None:
    with start_ranks(2, wait, tmp_path / "up", logs=tmp_path) as ranks:
        await_files(tmp_path / "up.0", tmp_path / "up.1")
        os.kill(ranks.pids[1], signal.SIGSTOP)
        os.kill(ranks.pids[0], signal.SIGKILL)
        assert ranks.wait_for_first_failure() == [-signal.SIGKILL, None]
        with pytest.raises(TimeoutError, match=r"\[-9, None\]"):
            ranks.wait(0.5)
    assert ranks.exit_codes() == [-signal.SIGKILL, -signal.SIGKILL]


# --------------------------------------------------------------------------- runs


@pytest.fixture
def forked() -> Iterator[None]:
    with starting_ranks(forked_start_ranks):
        yield


@pytest.mark.usefixtures("forked")
def test_a_run_of_two_ranks_that_score_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "bare.py").write_text(
        "import sys\n"
        "def score(prompt, completion, reference):\n"
        "    return float('nan') if 'torch' in sys.modules else 0.5\n"
    )
    (tmp_path / "config.yaml").write_text("name: tiny\n")
    changes = [*TINY_RUN, f"root={tmp_path}", "trainer.steps=1", "parallel.tensor=2"]
    changes += ["reward={function: 'bare:score', workers: 1}", "warm_start.steps=1"]
    train(load_config(tmp_path / "config.yaml", changes), resume=False, overwrite=False)
    found = rl_rows(RunDir(tmp_path / "tiny"))
    assert [row["step"] for row in found] == [0, 1]
    assert found[1]["reward/mean"] == 0.5


def start(folder: Path) -> None:
    forked_start_ranks("faulty", [], count=2, name="test", logs=folder, process=ProcessConfig())


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The module that ranks run; rank 0 stays, whatever it is asked."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "faulty.py").write_text(
        "import os, pathlib, signal, time\n"
        "from proma_megatron.processes.failures import fail\n"
        "up = pathlib.Path(__file__).with_name('up')\n"
        "def main(arguments):\n"
        "    if os.environ['RANK'] == '0':\n"
        "        signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "        up.write_text(str(os.getpid()))\n"
        f"        time.sleep({2 * SECONDS})\n"
        "    while not up.exists():\n"
        "        time.sleep(0.01)\n"
        "    FAIL\n"
    )
    return tmp_path


def write_fault(folder: Path, fault: str) -> None:
    module = folder / "faulty.py"
    module.write_text(module.read_text().replace("FAIL", fault))


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("os.kill(os.getpid(), 9)", WorkerError, r"rank 1 was ended by signal 9 \(SIGKILL"),
        ("os._exit(7)", WorkerError, "rank 1 ended with exit code 7 and left no error"),
        ("fail(up.parent, ValueError('own'))", WorkerError, "rank 1 failed:\n(.*\n)*.*own"),
    ],
)
def test_a_rank_that_fails_is_named_and_the_others_are_ended(
    faulty: Path, fault: str, kind: type[Exception], message: str
) -> None:
    write_fault(faulty, fault)
    before = time.monotonic()
    with pytest.raises(kind, match=message):
        start(faulty)
    assert time.monotonic() - before < SECONDS
    with pytest.raises(ProcessLookupError):
        os.kill(int((faulty / "up").read_text()), 0)
