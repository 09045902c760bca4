"""What Slurm says of jobs, and what is made of it."""

from pathlib import Path

import pytest
from support.launch import Programs, Script

from proma_megatron.launching.connection import Here
from proma_megatron.launching.states import JobState, ask, parse
from proma_megatron.launching.submitted import SubmittedJob

SCONTROL = (
    "JobId={id} JobName=x.train UserId=ada(1000) GroupId=ada(1000) MCS_label=N/A Priority=1 "
    "Nice=0 Account=lab QOS=(null) JobState={state} Reason={reason} Dependency=(null) Requeue=1 "
    "Restarts={restarts} BatchFlag=1 Reboot=0 ExitCode={code} RunTime=00:12:34 "
    "TimeLimit=04:00:00 NodeList=node[1-2] BatchHost=node1 NumNodes=2 Command=/x/a=b.sh"
)


def scontrol(
    state: str, *, reason: str = "None", restarts: int = 0, code: str = "0:0", number: str = "7"
) -> str:
    return SCONTROL.format(state=state, reason=reason, restarts=restarts, code=code, id=number)


def job(name: str, number: str) -> SubmittedJob:
    return SubmittedJob(name, number, f"/my jobs/{name}", None, ())


@pytest.mark.parametrize(
    ("answer", "words", "over", "succeeded"),
    [
        (scontrol("PENDING", reason="Priority"), "PENDING, Priority", False, False),
        (
            scontrol("RUNNING", restarts=2),
            "RUNNING, attempt 3, for 00:12:34 on node[1-2]",
            False,
            False,
        ),
        (scontrol("COMPLETING"), "COMPLETING", False, False),
        (scontrol("SUSPENDED"), "SUSPENDED", False, False),
        (scontrol("REQUEUED", code="75:0"), "REQUEUED", False, False),
        (scontrol("COMPLETED"), "COMPLETED", True, True),
        (scontrol("COMPLETED", restarts=1), "COMPLETED, attempt 2", True, True),
        (
            scontrol("FAILED", reason="NonZeroExitCode", code="1:0"),
            "FAILED, exit code 1, NonZeroExitCode",
            True,
            False,
        ),
        (scontrol("FAILED", code="0:9"), "FAILED, exit code 137", True, False),
        (scontrol("CANCELLED", reason="DependencyNeverSatisfied"), None, True, False),
        (scontrol("TIMEOUT", code="0:15"), "TIMEOUT, exit code 143", True, False),
        (scontrol("NODE_FAIL"), "NODE_FAIL", True, False),
        (scontrol("PREEMPTED"), "PREEMPTED", True, False),
        (scontrol("OUT_OF_MEMORY", code="0:125"), "OUT_OF_MEMORY, exit code 253", True, False),
        ("job exited with code 0", "COMPLETED", True, True),
        ("job exited with code 75", "FAILED, exit code 75", True, False),
        ("COMPLETED|0:0|00:01:00|node1", "COMPLETED", True, True),
        ("CANCELLED by 1000|0:15|00:01:00|node1", "CANCELLED, exit code 143", True, False),
        ("RUNNING|0:0|00:01:00|node1", "RUNNING, for 00:01:00 on node1", False, False),
        ("FAILED|2:0|00:01:00|node1", "FAILED, exit code 2", True, False),
        ("", "UNKNOWN", False, False),
        ("slurm_load_jobs error: Invalid job id specified", "UNKNOWN", False, False),
    ],
    ids=lambda value: value[-30:] if isinstance(value, str) else str(value),
)
def test_answers_are_understood(
    answer: str, words: str | None, over: bool, succeeded: bool
) -> None:
    state = parse(answer)
    assert state.over is over
    assert state.succeeded is succeeded
    assert str(state) == (words or "CANCELLED, DependencyNeverSatisfied")


def test_an_attempt_that_was_queued_again_has_no_exit_code_to_show() -> None:
    """The controller still has that of the attempt before."""
    assert "exit code" not in str(parse(scontrol("PENDING", code="75:0", restarts=1)))


def test_jobs_are_asked_for_at_once_and_each_gets_its_own_answer() -> None:
    cluster = Script([f"9 {scontrol('RUNNING', number='9')}\n8 job exited with code 1\n"])
    states = ask(cluster, [job("a", "8"), job("b", "9"), job("c", "10")])
    assert [state.state for state in states] == ["FAILED", "RUNNING", "NO ANSWER"]
    assert len(cluster.asked) == 1


def test_a_job_that_was_never_submitted_is_unknown() -> None:
    assert ask(Script(["\n"]), [job("a", "")]) == [JobState("UNKNOWN")]


class Shell(Here):
    """This machine, with programs of the test's first on PATH."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs

    def run(self, command: str) -> str:
        return self._programs.bash(command).stdout


@pytest.mark.parametrize(
    ("scontrol_says", "log", "sacct_says", "state"),
    [
        (
            "slurm_load_jobs error: Invalid job id specified",
            "job exited with code 0",
            "",
            "COMPLETED",
        ),
        ("slurm_load_jobs error: Invalid job id specified", "job exited with code 1", "", "FAILED"),
        (
            "slurm_load_jobs error: Unable to contact slurm controller",
            "job exited with code 75",
            "",
            "NO ANSWER",
        ),
        (
            "slurm_load_jobs error: Invalid job id specified",
            "job exited with code 75\nproma: attempt 0 ended with code 75 and is queued again",
            "TIMEOUT|0:0|01:00:00|node[1-2]",
            "TIMEOUT",
        ),
        ("slurm_load_jobs error: Invalid job id specified", "", "", "UNKNOWN"),
    ],
)
def test_only_a_controller_that_has_forgotten_a_job_is_gone_round(
    programs: Programs, tmp_path: Path, scontrol_says: str, log: str, sacct_says: str, state: str
) -> None:
    """While it restarts, what a log says may be of an attempt before."""
    programs.add("scontrol", f"echo '{scontrol_says}' >&2; exit 1")
    programs.add("sacct", f"echo '{sacct_says}'")
    (tmp_path / "sbatch_x_7.out").write_text(f"{log}\n")
    (found,) = ask(Shell(programs), [SubmittedJob("train", "7", str(tmp_path), object(), ())])
    assert found.state == state


@pytest.mark.parametrize(
    ("marker", "state"), [("succeeded", "COMPLETED"), ("failed", "FAILED"), (None, "RUNNING")]
)
def test_what_ran_on_this_machine_left_a_mark(
    tmp_path: Path, marker: str | None, state: str
) -> None:
    if marker is not None:
        (tmp_path / marker).touch()
    (found,) = ask(Here(), [SubmittedJob("train", "train-x1", str(tmp_path), None, ())])
    assert found.state == state
