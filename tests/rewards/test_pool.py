"""No sample stalls the others or goes missing; rewards add up; and no process is left behind."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from proma_megatron.config.rollout import RewardConfig
from proma_megatron.errors import RewardError
from proma_megatron.rewards.pool import Scorer
from proma_megatron.types import Problem, Prompt, Rollout, ScoredRollout

pytestmark = pytest.mark.ranks

LIMIT = 100  # max_new_tokens
Processes = Callable[[], set[int | None]]

# A power tower: math-verify does not come back from it, and its own alarm does not stop it.
ENDLESS = r"\boxed{\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}}"

MODULE = r"""
import os, signal, sys, time


class Unpicklable(Exception):
    def __init__(self, first, second):
        super().__init__(first)


def obey(prompt, completion, reference):
    print("printed by the reward function", flush=True)
    what, _, value = completion.partition(" ")
    match what:
        case "score":
            return float(value)
        case "sleep":
            time.sleep(float(value))
            return float(value)
        case "loop":
            while True:
                pass
        case "compute":  # in C, where Python handles no signal and lets no other thread run
            sum(range(10**15))
        case "exit":
            os._exit(int(value))
        case "leave":
            sys.exit(int(value))
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise Unpicklable("of no\nuse", lambda: 0)
        case "return":
            return {"nan": float("nan"), "text": "1", "none": None}[value]
        case "texts":
            return float([prompt, reference] == ["the prompt", "11"])
        case "torch":
            return float("torch" in sys.modules)
    return 0.0
"""

ELSEWHERE = """
import multiprocessing, os, time
in_process = multiprocessing.parent_process() is not None
"""

TRAINER = """
import multiprocessing
from pathlib import Path

from proma_megatron.config.rollout import RewardConfig
from proma_megatron.rewards.pool import Scorer


def main():
    from proma_megatron.types import Problem, Prompt, Rollout

    def rollout(text):
        return Rollout(Prompt(Problem("a", "", "", ""), "", ()), 0, (), (), text, True)

    scorer = Scorer(RewardConfig(function="reward_here:obey", timeout_seconds=600), 1)
    torch, three = scorer.score([rollout("torch"), rollout("score 3")])
    print(torch.score, three.score, flush=True)
    scorer.score([rollout("loop"), rollout("compute")])


if __name__ == "__main__":
    main()
"""


def rollout(
    text: str, *, sample: int = 0, reference: str = "11", tokens: int = 5, finished: bool = True
) -> Rollout:
    prompt = Prompt(Problem("apples-7", "How many?", "#### 11", reference), "the prompt", (5, 6))
    return Rollout(prompt, sample, (7,) * tokens, (-0.5,) * tokens, text, finished)


def rollouts(*texts: str) -> list[Rollout]:
    return [rollout(text, sample=n) for n, text in enumerate(texts)]


def outcomes(scored: list[ScoredRollout]) -> list[tuple[float, bool]]:
    return [(item.score, item.timed_out) for item in scored]


@pytest.fixture(autouse=True)
def processes() -> Iterator[Processes]:
    """Those that the test has started; none may be left."""
    before = {child.pid for child in mp.active_children()}

    def started() -> set[int | None]:
        return {child.pid for child in mp.active_children()} - before

    yield started
    assert not started()


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "reward_of_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def scorer(on_path: Path) -> Iterator[Scorer]:
    """With the function of `MODULE`."""
    with Scorer(RewardConfig(function="reward_of_test:obey", timeout_seconds=1.0), LIMIT) as made:
        yield made


# --------------------------------------------------------------------------- limits


# The first test: the fork server imports math-verify if the first scorer of a session wants it.
def test_an_endless_expression_costs_its_own_sample_only() -> None:
    texts = [r"so \boxed{\frac{22}{2}}", ENDLESS, "#### 12", r"\boxed{11}", r"\boxed{1}", "11"]
    with Scorer(RewardConfig(function="math", timeout_seconds=1.0), LIMIT) as scorer:
        scored = scorer.score(rollouts(*texts))
        assert [item.score for item in scored] == [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
        assert [item.timed_out for item in scored] == [False, True, False, False, False, False]
        assert [item.rollout.text for item in scored] == texts
        start = time.monotonic()
        assert outcomes(scorer.score(rollouts(r"\boxed{11}"))) == [(1.0, False)]
        assert time.monotonic() - start < 10  # the lost process is replaced


def test_more_endless_samples_than_processes_leave_the_others_their_time(scorer: Scorer) -> None:
    start = time.monotonic()
    scored = scorer.score(rollouts("loop", "compute", "compute", "score 2", "score 3"))
    assert outcomes(scored) == [(0, True), (0, True), (0, True), (2, False), (3, False)]
    assert time.monotonic() - start < 4.5  # two limits, and no wait for a process to end itself


def test_waiting_for_a_process_does_not_count(on_path: Path) -> None:
    config = RewardConfig(function="reward_of_test:obey", timeout_seconds=1.0, workers=1)
    with Scorer(config, LIMIT) as scorer:
        scored = scorer.score(rollouts(*["sleep 0.4"] * 3))
    assert outcomes(scored) == [(0.4, False)] * 3


def test_importing_the_users_module_does_not_count(on_path: Path) -> None:
    source = f"{ELSEWHERE}\ntime.sleep(1.0 if in_process else 0)\n{MODULE}"
    (on_path / "slow_reward_of_test.py").write_text(source)
    config = RewardConfig(function="slow_reward_of_test:obey", timeout_seconds=0.5, workers=1)
    with Scorer(config, LIMIT) as scorer:
        scored = scorer.score(rollouts("score 1", "loop", "score 2"))  # the third in a new process
    assert outcomes(scored) == [(1, False), (0, True), (2, False)]


def test_the_limit_holds_for_the_pattern_as_well(on_path: Path) -> None:
    config = RewardConfig(function="gsm8k", format_pattern="(a|aa)+$", timeout_seconds=0.5)
    with Scorer(config, LIMIT) as scorer:
        scored = scorer.score(rollouts("a" * 200 + "\n#### 11", "a\n#### 11"))
    assert outcomes(scored) == [(0, True), (1, False)]


# --------------------------------------------------------------------------- order and texts


def test_order_is_that_of_the_rollouts_whatever_takes_longer(scorer: Scorer) -> None:
    given = rollouts("sleep 0.3", "score 1", "sleep 0.2", "score 2", "texts", "score -3")
    scored = scorer.score(given)
    assert [item.rollout for item in scored] == given
    assert [item.score for item in scored] == [0.3, 1.0, 0.2, 2.0, 1.0, -3.0]
    assert scorer.score([]) == []


def test_scoring_processes_are_kept_between_batches(scorer: Scorer, processes: Processes) -> None:
    scorer.score(rollouts("score 1"))
    before = processes()
    scorer.score(rollouts("score 1"))
    assert processes() == before
    assert len(before) == RewardConfig().workers


def test_gsm8k_needs_no_process(processes: Processes) -> None:
    scorer = Scorer(RewardConfig(), LIMIT)
    assert outcomes(scorer.score(rollouts("#### 11", "#### 12"))) == [(1, False), (0, False)]
    assert not processes()


# --------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exit 3", "the process that scored .* ended with exit code 3"),
        ("kill", r"the process that scored .* ended with signal 9 \(SIGKILL\)"),
        ("leave 0", "the reward function raised SystemExit: 0 on"),
        ("raise", "the reward function raised Unpicklable: of no use on"),
        ("return nan", "the reward function returned nan on"),
        ("return text", "the reward function returned '1' on"),
        ("return none", "the reward function returned None on"),
    ],
)
def test_a_fault_names_the_sample_and_the_scorer_can_go_on(
    scorer: Scorer, processes: Processes, text: str, message: str
) -> None:
    # The rest is more than a pipe holds, so that it can't all be on its way when the fault is seen.
    rest = [f"score 1{' ' * 10_000}"] * 64
    with pytest.raises(RewardError, match=message) as error:
        scorer.score(rollouts("score 1", "score 2", text, *rest))
    assert "problem 'apples-7', sample 2" in str(error.value)
    assert "expected a finite number" in str(error.value)
    assert "\n" not in str(error.value)
    assert not processes()
    assert outcomes(scorer.score(rollouts("score 1"))) == [(1, False)]


def test_exit_code_0_is_taken_for_a_sample_that_does_not_come_back(scorer: Scorer) -> None:
    assert outcomes(scorer.score(rollouts("exit 0", "score 1"))) == [(0, True), (1, False)]


def test_a_reference_that_the_function_can_not_take_is_a_fault() -> None:
    with pytest.raises(RewardError, match="the reference is 'many', expected a number on problem"):
        Scorer(RewardConfig(), LIMIT).score([rollout("#### 1", reference="many")])


@pytest.mark.parametrize(
    ("at_import", "message"),
    [
        ("if in_process: raise OSError('no second time')", "OSError: no second time"),
        ("if in_process: os._exit(4)", "the scoring processes ended while they had no sample"),
    ],
)
def test_a_module_that_only_the_trainer_can_import_is_a_fault(
    on_path: Path, at_import: str, message: str
) -> None:
    name = f"reward_of_test_{abs(hash(at_import))}"
    (on_path / f"{name}.py").write_text(f"{ELSEWHERE}\n{at_import}\n{MODULE}")
    with (
        Scorer(RewardConfig(function=f"{name}:obey"), LIMIT) as scorer,
        pytest.raises(RewardError, match=message),
    ):
        scorer.score(rollouts("score 1"))


def test_idle_processes_that_something_ended_are_replaced(
    scorer: Scorer, processes: Processes
) -> None:
    scorer.score(rollouts("score 1"))
    for pid in processes():
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)  # until the pool has seen it; within this time it would be a RewardError
    assert outcomes(scorer.score(rollouts("score 1"))) == [(1, False)]


def test_a_stop_that_reaches_every_process_of_a_job_ends_no_sample(
    scorer: Scorer, processes: Processes
) -> None:
    """As Slurm sends it, to the fork server and to processes in the middle of a sample, too."""
    scorer.score(rollouts("score 1"))
    mine = [pid for pid in processes() if pid is not None]
    every = {*mine, *(psutil.Process(pid).ppid() for pid in mine)}

    def tell() -> None:
        for pid in every:
            for number in (signal.SIGUSR1, signal.SIGTERM):
                os.kill(pid, number)

    telling = threading.Timer(0.3, tell)
    telling.start()
    scored = scorer.score(rollouts("sleep 0.6", "loop"))
    telling.join()
    assert outcomes(scored) == [(0.6, False), (0, True)]
    assert outcomes(scorer.score(rollouts("score 2"))) == [(2, False)]


# --------------------------------------------------------------------------- bonus and penalty


@pytest.mark.parametrize(
    ("tokens", "finished", "buffer", "lost"),
    [
        (100, False, 0, 0.5),
        (100, True, 0, 0.0),  # the last token that was allowed is the EOS
        (79, True, 20, 0.0),
        (80, True, 20, 0.0),
        (85, True, 20, 0.125),
        (99, True, 20, 0.475),
        (100, True, 20, 0.5),
        (100, False, 20, 0.5),
        (1, True, 100, 0.005),
    ],
)
def test_the_penalty_grows_over_the_buffer_to_the_limit(
    tokens: int, finished: bool, buffer: int, lost: float
) -> None:
    config = RewardConfig(overlong_penalty=0.5, overlong_buffer=buffer)
    sample = rollout("#### 11", tokens=tokens, finished=finished)
    (scored,) = Scorer(config, LIMIT).score([sample])
    assert scored.score == 1.0
    assert scored.reward == pytest.approx(1.0 - lost, abs=1e-12)


def test_the_bonus_is_for_the_form_right_or_wrong() -> None:
    config = RewardConfig(format_bonus=0.1, overlong_penalty=0.5)
    given = [*rollouts("#### 11", "#### 12", "11"), rollout("#### 12", finished=False)]
    scored = Scorer(config, LIMIT).score(given)
    assert [item.reward for item in scored] == pytest.approx([1.1, 0.1, 0.0, -0.4])
    assert [item.score for item in scored] == [1.0, 0.0, 0.0, 0.0]


def test_a_pattern_describes_the_form_of_a_users_function(on_path: Path) -> None:
    config = RewardConfig(
        function="reward_of_test:obey",
        format_bonus=0.25,
        format_pattern="<a>.+</a>",
        timeout_seconds=0.5,
        overlong_penalty=0.5,
    )
    given = rollouts("score 1 ", "other <a>x\ny</a>", "other <a></a>", "loop <a>x</a>")[1:]
    with Scorer(config, LIMIT) as scorer:
        scored = scorer.score([*given, rollout("loop <a>x</a>", finished=False)])
    # What runs out of time has no bonus, and loses the penalty like any other.
    assert [item.reward for item in scored] == [0.25, 0.0, 0.0, -0.5]


# --------------------------------------------------------------------------- processes


def test_processes_import_no_torch_and_end_with_a_trainer_that_is_killed(tmp_path: Path) -> None:
    """With the user's module in the current folder, the trainer being run as a module."""
    (tmp_path / "reward_here.py").write_text(MODULE)
    (tmp_path / "trainer_here.py").write_text(TRAINER)
    with subprocess.Popen(
        [sys.executable, "-m", "trainer_here"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "."},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as trainer:
        assert trainer.stdout is not None
        assert trainer.stderr is not None
        try:
            line = trainer.stdout.readline()  # the function's own output is not in it
            others = psutil.Process(trainer.pid).children(recursive=True)
            time.sleep(0.2)
        finally:
            trainer.kill()
        _, alive = psutil.wait_procs(others, timeout=10)
        for process in alive:
            process.kill()
        assert alive == []
        # Two scoring processes in an endless loop, the fork server, and Python's tracker.
        assert len(others) == 4
        said = trainer.stderr.read()
        assert line == "0.0 3.0\n", said
        assert "printed by the reward function" in said
