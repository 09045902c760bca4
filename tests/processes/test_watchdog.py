"""Hangs end the run, and say where every rank was; the rank that failed first is the one shown."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.command import ROOT, proma

from proma_megatron.config.trainer import PhaseMinutes
from proma_megatron.errors import ConfigError, HangError, WorkerError
from proma_megatron.observability.timing import Stopwatch
from proma_megatron.processes.failures import (
    first_error,
    forget_earlier,
    record_error,
    stacks_folder,
)
from proma_megatron.processes.watchdog import Phases

# --------------------------------------------------------------------------- what is late


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_phase_is_late_after_its_limit_and_an_outer_one_counts_on() -> None:
    clock = Clock()
    phases = Phases(PhaseMinutes(train=2, kl=1, save=None), clock)
    phases.step = 3
    with phases.phase("step"), phases.phase("train"):
        for _ in range(3):
            with phases.phase("kl_lagged"):
                clock.now += 39
                assert phases.late() is None
        with phases.phase("save"):
            assert str(phases) == "step 3, phase step > train > save"
            clock.now += 4
            assert phases.late() == (
                "121 s in phase train of step 3, more than trainer.phase_minutes.train=2 allows"
            )
        phases.excuse(60)
        assert phases.late() is None
    assert str(phases) == "step 3, between phases"
    with phases.phase("kl_lagged"):
        clock.now += 61
        late = phases.late()
    assert late is not None
    assert "phase kl_lagged of step 3, more than trainer.phase_minutes.kl=1" in late
    with phases.phase("save"), phases.phase("a phase without a key"):
        clock.now += 1e9
        assert phases.late() is None


def test_the_stopwatch_tells_of_its_phases() -> None:
    phases = Phases(PhaseMinutes())
    stopwatch = Stopwatch(watch=phases.phase)
    with stopwatch.phase("step"), stopwatch.phase("train"), stopwatch.phase("train"):
        assert str(phases) == "step 0, phase step > train"
    with pytest.raises(KeyError), stopwatch.phase("train"):
        raise KeyError
    assert str(phases) == "step 0, between phases"


# --------------------------------------------------------------------------- the processes

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from proma_megatron.config.trainer import PhaseMinutes
from proma_megatron.processes.watchdog import Phases, Watchdog

rank, logs = int(sys.argv[1]), Path(sys.argv[2])
phases = Phases(PhaseMinutes(train=0.01) if rank == 0 else None)
phases.step = 4

def hang_here():
    while True:
        time.sleep(0.01)

with Watchdog(logs, phases, rank) as watchdog:
    (logs / f"pid{rank}").write_text(str(os.getpid()))
    while len(found := [p.read_text() for p in sorted(logs.glob("pid*"))]) < 3 or "" in found:
        time.sleep(0.01)
    watchdog.peers_are(dict(enumerate(map(int, found))))
    with phases.phase("step"), phases.phase("train"):
        if rank == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        hang_here()
"""


@pytest.mark.ranks
def test_the_late_rank_ends_itself_with_the_stacks_of_all_that_can_answer(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        _, said = ranks[0].communicate(timeout=30)
        assert ranks[0].returncode == 1
        sentence = (
            f"in phase train of step 4, more than trainer.phase_minutes.train=0.01 allows; Python "
            f"stacks of ranks 0 and 1 are in {tmp_path}/stacks; rank 2 wrote none: it is stopped "
            "(state T)"
        )
        assert sentence in said
        assert said.startswith("error: rank 0 has spent 1 s")
        record = json.loads((tmp_path / "error_rank0.json").read_text())
        assert record["kind"] == "HangError"
        assert sentence in record["message"]
        assert ranks[1].poll() is None  # whoever asks for stacks leaves a rank alive
        for rank in (0, 1):
            found = (tmp_path / "stacks" / f"rank_00{rank}.txt").read_text()
            assert found.startswith(f"rank {rank}, pid {ranks[rank].pid} on ")
            assert "step 4, phase step > train since" in found.splitlines()[0]
            assert "in hang_here" in found
        # Where a stopped rank was is in its first line all the same.
        (line,) = (tmp_path / "stacks" / "rank_002.txt").read_text().splitlines()
        assert "step 4, phase step > train" in line
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.ranks
def test_a_reward_that_hangs_ends_the_run_with_its_line_named(tmp_path: Path) -> None:
    (tmp_path / "sleepy.py").write_text(
        "import time\n"
        "def score(prompt, completion, reference):\n"
        "    with open('calls', 'ab') as calls:\n"
        "        calls.write(b'.')\n"
        "    with open('calls', 'rb') as calls:\n"
        "        hang = len(calls.read()) > 4  # validation is over: the processes have started\n"
        "    while hang:\n"
        "        time.sleep(0.1)\n"
        "    return 0.0\n"
    )
    (tmp_path / "config.yaml").write_text(
        "name: hangs\n"
        "model: {hidden_size: 32, ffn_hidden_size: 64, layers: 1, head_dim: 8}\n"
        "data: {train_problems: 200, validation_problems: 4}\n"
        "rollout: {prompts_per_step: 4, samples_per_prompt: 2, max_new_tokens: 4}\n"
        "reward: {function: 'sleepy:score', timeout_seconds: 1000}\n"
        "parallel: {tensor: 2}\n"
        "trainer: {steps: 2, phase_minutes: {score: 0.05}}\n"
    )
    done = proma("train", "config.yaml", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    ended = time.time()
    assert done.returncode == 1, done.stderr
    assert "resource_tracker" not in done.stderr  # cleans up what the ranks left, and is silent
    run = tmp_path / "runs" / "hangs"
    said = done.stderr.splitlines()[-1]
    assert "in phase score of step 1, more than trainer.phase_minutes.score=0.05" in said
    assert "Python stacks of ranks 0 and 1 are in runs/hangs/logs/stacks" in said
    stacks = stacks_folder(run / "logs")
    for rank in (0, 1):
        assert "in score_rollouts" in (stacks / f"rank_00{rank}.txt").read_text()
    assert 'sleepy.py", line 8 in score' in (stacks / "rank_000_scoring.txt").read_text()
    errors = [json.loads(path.read_text()) for path in (run / "logs").glob("error_rank*.json")]
    assert ended - min(error["time"] for error in errors) < 10


# --------------------------------------------------------------------------- who failed first


def write(logs: Path, rank: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", str(rank))
    record_error(logs, error)


def failures(**codes: int) -> Any:
    found = {int(rank[1:]): SimpleNamespace(exitcode=code) for rank, code in codes.items()}
    return SimpleNamespace(failures=found, get_first_failure=lambda: next(iter(found.items())))


CLOSED = RuntimeError("Connection closed by peer [127.0.0.1]:1234")


def test_an_error_comes_before_those_that_it_causes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1, KeyError("first"), monkeypatch)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600)  # somebody sets the clock
    write(tmp_path, 0, CLOSED, monkeypatch)
    write(tmp_path, 1, RuntimeError("while leaving"), monkeypatch)
    found = first_error(tmp_path, failures(r0=1, r1=1), ended={0})
    assert isinstance(found, WorkerError)
    assert str(found).startswith("rank 1 failed:")
    assert "KeyError: 'first'" in str(found)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-signal.SIGKILL, "was ended by signal 9 (SIGKILL, often for lack of memory)"),
        (-signal.SIGTERM, "was ended by signal 15 (SIGTERM)"),
        (3, "ended with exit code 3 and left no error"),
    ],
)
def test_a_rank_that_leaves_without_a_word_comes_before_its_peers_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    write(tmp_path, 0, CLOSED, monkeypatch)
    found = first_error(tmp_path, failures(r0=1, r1=-9, r2=code), ended={0, 1})
    assert str(found) == f"rank 2 {words}; its output is in {tmp_path}"


def test_a_rank_that_the_launcher_ended_is_not_the_one_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 0, HangError("rank 0 has spent 7 s"), monkeypatch)
    found = first_error(tmp_path, failures(r0=1, r1=-9), ended={1})
    assert isinstance(found, HangError)
    assert str(found) == "rank 0 has spent 7 s"


def test_an_earlier_attempts_errors_and_stacks_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_earlier(tmp_path)
    write(tmp_path, 0, ConfigError("old"), monkeypatch)
    assert isinstance(first_error(tmp_path, failures(r0=2)), ConfigError)
    stacks_folder(tmp_path).mkdir()
    (stacks_folder(tmp_path) / "late_on_here").touch()
    (tmp_path / "stdout.log").touch()
    forget_earlier(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["stacks", "stdout.log"]
