"""Logs as they are and as they grow, on a cluster that plays them back."""

import base64
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from proma_megatron.errors import UnreachableError
from proma_megatron.launching.connection import Here
from proma_megatron.launching.logs import follow, show
from proma_megatron.launching.submitted import SubmittedJob

TRAIN = SubmittedJob("train", "7", "/my jobs/train", object(), ())
EVAL = SubmittedJob("eval", "8", "/my jobs/eval", object(), ("train",))
BATCH = "/my jobs/train/sbatch_x.train_7.out"
FIRST = "/my jobs/train/log-x.train_7_0.out"
SECOND = "/my jobs/train/log-x.train_7_1.out"


class Playing:
    """A cluster whose files and states are those of a moment, which ends when jobs are asked for.

    Files and states come with each moment; what is not named stays. None: it does not answer.
    """

    def __init__(self, *moments: dict[str, str] | None) -> None:
        self._moments = iter(moments)
        self.now: dict[str, str] = {}
        self.read = 0

    def run(self, command: str) -> str:
        if "scontrol" in command:
            moment = next(self._moments)
            if moment is None:
                raise UnreachableError("login does not answer: timed out")
            self.now.update(moment)
            states = [(key, value) for key, value in self.now.items() if key.isdigit()]
            return "".join(f"{number} {state}\n" for number, state in states)
        if command.startswith("stat"):
            folder = shlex.split(command)[3].rpartition("/")[0]
            files = {name for name in self.now if name.startswith(f"{folder}/")}
            return "".join(f"{len(self.now[name].encode())} {name}\n" for name in files)
        words = shlex.split(command)
        assert words[:2] == ["tail", "-c"]
        assert words[-3:] == ["base64", "-w", "0"]
        start, end = int(words[2]) - 1, int(words[words.index("head") + 2])
        found = self.now[words[3]].encode()[start : start + end]
        self.read += len(found)
        return base64.b64encode(found).decode()


def state(name: str, restarts: int = 0, code: str = "0:0") -> str:
    return f"JobState={name} Reason=None Restarts={restarts} ExitCode={code} RunTime=0 NodeList=n"


RUNNING, COMPLETED = state("RUNNING"), state("COMPLETED")
Followed = Callable[..., tuple[list[str], list[str], list[str]]]


@pytest.fixture
def followed(capsys: pytest.CaptureFixture[str]) -> Followed:
    """Follows jobs: the lines printed, what was said, the states at the end."""

    def run(cluster: Playing, *jobs: SubmittedJob) -> tuple[list[str], list[str], list[str]]:
        said: list[str] = []
        states = follow(cluster, jobs or [TRAIN], seconds=0, say=said.append)
        return capsys.readouterr().out.splitlines(), said, [found.state for found in states]

    return run


# --------------------------------------------------------------------------- as they are


def shown(cluster: Playing, *, batch: bool = False) -> list[str]:
    return list(show(cluster, [TRAIN], batch=batch))


def test_logs_of_all_attempts_are_shown_in_their_order() -> None:
    logs = {f"/my jobs/train/log-x.train_7_{k}.out": f"line of {k}\n" for k in (10, 2, 0, 1)}
    cluster = Playing()
    cluster.now = logs
    lines = shown(cluster)
    assert [line for line in lines if line.startswith("line")] == [
        f"line of {attempt}" for attempt in (0, 1, 2, 10)
    ]
    assert lines[0] == f"==> train, job 7, attempt 0: {FIRST}"


def test_of_the_batch_script_only_what_tells_something_is_shown_unless_asked_for() -> None:
    cluster = Playing()
    trace = "export A=1\nproma: attempt 0 ended\n+ scontrol\nsrun: error: node1: task 0\n"
    cluster.now = {BATCH: trace, FIRST: "a line\n"}
    assert shown(cluster) == [
        f"==> train, job 7, attempt 0: {FIRST}",
        "a line",
        f"==> train, job 7, batch script: {BATCH}",
        "proma: attempt 0 ended",
        "srun: error: node1: task 0",
    ]
    assert "export A=1" in shown(cluster, batch=True)
    cluster.now = {BATCH: "export A=1\n", FIRST: "a line\n"}
    assert shown(cluster) == [f"==> train, job 7, attempt 0: {FIRST}", "a line"]


def test_a_last_line_without_an_end_is_shown() -> None:
    cluster = Playing()
    cluster.now = {FIRST: "one\ntw"}
    assert shown(cluster)[1:] == ["one", "tw"]


def test_a_job_that_was_never_submitted_has_no_logs() -> None:
    assert list(show(Playing(), [SubmittedJob("x", "", "/x", object(), ())])) == []


# --------------------------------------------------------------------------- as they grow


def test_lines_come_as_they_are_complete_and_none_twice(followed: Followed) -> None:
    cluster = Playing(
        {"7": state("PENDING")},
        {"7": RUNNING, FIRST: "one\ntw"},
        {},
        {FIRST: "one\ntwo\nthr"},
        {"7": COMPLETED, FIRST: "one\ntwo\nthree"},
    )
    lines, said, states = followed(cluster)
    assert lines == ["one", "two", "three"]
    assert states == ["COMPLETED"]
    assert said == [
        "train, job 7: PENDING",
        "train, job 7: RUNNING, for 0 on n",
        "train, job 7: COMPLETED",
    ]
    assert cluster.read == len("one\ntwo\nthree")  # of a long log, only what is new


def test_all_attempts_are_followed_and_a_new_one_is_said(followed: Followed) -> None:
    lines, said, states = followed(
        Playing(
            {"7": RUNNING, FIRST: "begin\n"},
            {"7": state("PENDING", 1), FIRST: "begin\nstopped", BATCH: "+ x\nproma: again\n"},
            {"7": state("RUNNING", 1), SECOND: "resumed\n"},
            {"7": state("COMPLETED", 1), SECOND: "resumed\ndone\n"},
        )
    )
    assert states == ["COMPLETED"]
    assert sorted(lines) == sorted(["begin", "proma: again", "resumed", "done", "stopped"])
    assert lines.index("begin") < lines.index("resumed") < lines.index("done")
    assert said[1:3] == [
        "train, job 7: PENDING, attempt 2",
        "train, job 7: RUNNING, attempt 2, for 0 on n",
    ]


def test_a_cluster_that_does_not_answer_is_asked_again_and_nothing_is_lost(
    followed: Followed,
) -> None:
    lines, said, states = followed(
        Playing(
            {"7": RUNNING, FIRST: "one\ntw"},
            None,
            None,
            {FIRST: "one\ntwo\nthree\n"},
            None,
            {"7": state("FAILED", code="1:0"), FIRST: "one\ntwo\nthree\nerror: no\n"},
        )
    )
    assert lines == ["one", "two", "three", "error: no"]
    assert states == ["FAILED"]
    waits = "login does not answer: timed out; jobs go on, and this waits"
    assert said.count(waits) == 2  # once for each silence


def test_lines_of_several_jobs_say_whose_they_are(followed: Followed) -> None:
    lines, said, states = followed(
        Playing(
            {"7": RUNNING, "8": state("PENDING"), FIRST: "one\n"},
            {"7": COMPLETED},
            {"8": state("FAILED", code="2:0"), "/my jobs/eval/log-x.eval_8_0.out": "two"},
        ),
        TRAIN,
        EVAL,
    )
    assert lines == ["train | one", "eval | two"]
    assert states == ["COMPLETED", "FAILED"]
    assert said[-1] == "eval, job 8: FAILED, exit code 2"
    assert len([line for line in said if re.match("train", line)]) == 2


def test_letters_of_several_bytes_arrive_whole(followed: Followed) -> None:
    lines, _, _ = followed(
        Playing({"7": RUNNING, FIRST: "ü\nein"}, {"7": COMPLETED, FIRST: "ü\nein Wörtchen\n"})
    )
    assert lines == ["ü", "ein Wörtchen"]


def test_a_log_that_is_not_text_is_shown_nevertheless(tmp_path: Path) -> None:
    (tmp_path / "log-x_7_0.out").write_bytes(b"bad \xff byte\n")
    job = SubmittedJob("t", "7", str(tmp_path), object(), ())
    assert list(show(Here(), [job]))[1:] == ["bad \ufffd byte"]


def test_a_job_that_is_over_when_it_is_first_asked_for_is_shown(followed: Followed) -> None:
    lines, said, states = followed(Playing({"7": COMPLETED, FIRST: "one\n"}))
    assert (lines, said, states) == (["one"], ["train, job 7: COMPLETED"], ["COMPLETED"])


def test_a_slurm_that_does_not_answer_is_said_once_and_waited_for(followed: Followed) -> None:
    lines, said, states = followed(
        Playing(
            {"7": RUNNING},
            *({"7": "NO ANSWER: Unable to contact slurm controller"} for _ in range(20)),
            {"7": COMPLETED, FIRST: "one\n"},
        )
    )
    assert (lines, states) == (["one"], ["COMPLETED"])
    assert said[1] == (
        "Slurm does not answer: Unable to contact slurm controller; jobs go on, and this waits"
    )
    assert len(said) == 3


def test_a_job_that_slurm_has_forgotten_is_given_up(followed: Followed) -> None:
    """Without accounting and without a last word nobody will ever know how it ended."""
    lines, said, states = followed(Playing({"7": "", FIRST: "one\ntw"}, *({} for _ in range(20))))
    assert (lines, said, states) == (["one", "tw"], ["train, job 7: UNKNOWN"], ["UNKNOWN"])


def test_a_letter_that_is_cut_in_two_arrives_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log-x_7_0.out"

    class Growing(Here):
        """A file whose last letter is written in two steps, as the states go on."""

        steps = iter(
            [(RUNNING, b"one \xc3"), (RUNNING, b"one \xc3"), (COMPLETED, b"one \xc3\xbc\n")]
        )

        def run(self, command: str) -> str:
            if "scontrol" not in command:
                return super().run(command)
            found, text = next(self.steps)
            log.write_bytes(text)
            return f"7 {found}\n"

    job = SubmittedJob("t", "7", str(tmp_path), object(), ())
    follow(Growing(), [job], seconds=0, say=lambda text: None)
    assert capsys.readouterr().out == "one ü\n"
