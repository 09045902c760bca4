"""How jobs are doing, in Slurm's words.

Slurm is asked itself. NeMo-Run's own way needs an accounting database: where sacct has not answered
30 times it cancels the job.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from proma_megatron.launching.connection import Connection
from proma_megatron.launching.scripts import FAILED, SETUP_FAILED, SUCCEEDED
from proma_megatron.launching.submitted import SubmittedJob

_GOING = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "SUSPENDED",
    "COMPLETING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "RESIZING",
    "SIGNALING",
    "SPECIAL_EXIT",
    "STAGE_OUT",
    "STOPPED",
    "RESV_DEL_HOLD",
    "POWER_UP_NODE",
}
UNKNOWN = "UNKNOWN"  # to Slurm
NO_ANSWER = "NO ANSWER"  # of Slurm, this time
_LAST_WORDS = "job exited with code "  # of NeMo-Run's batch scripts


@dataclass(frozen=True)
class JobState:
    """One job at one moment."""

    state: str  # Slurm's, such as "RUNNING"
    restarts: int = 0
    exit_code: int | None = None  # of the batch script, once it has ended
    reason: str | None = None  # why it waits, or ended
    nodes: str | None = None
    elapsed: str | None = None  # of the attempt, "00:12:34"

    @property
    def over(self) -> bool:
        """Whether nothing will change any more."""
        return self.state not in {*_GOING, UNKNOWN, NO_ANSWER}

    @property
    def succeeded(self) -> bool:
        return self.state == "COMPLETED"

    def __str__(self) -> str:
        words = [self.state]
        if self.restarts:
            words.append(f"attempt {self.restarts + 1}")
        if self.over and self.exit_code:
            words.append(f"exit code {self.exit_code}")
        if self.reason and not (self.succeeded or self.state == "RUNNING"):
            words.append(self.reason)
        if self.state == "RUNNING" and self.elapsed:
            words.append(f"for {self.elapsed} on {self.nodes}")
        return ", ".join(words)


def ask(connection: Connection, jobs: Sequence[SubmittedJob]) -> list[JobState]:
    """Ask for the state of each job.

    Slurm's controller forgets jobs minutes after their end. Then what the batch script said last
    is looked up, and where it could say nothing the accounting database is asked, if there is one.
    A controller that does not answer has forgotten nothing.

    Raises:
        UnreachableError: the cluster can't be asked.
    """
    commands = [_question(job) for job in jobs if job.id]
    answers = {}
    for line in connection.run("; ".join(commands)).splitlines() if commands else ():
        number, _, answer = line.partition(" ")
        answers[number] = parse(answer)
    return [answers.get(job.id, JobState(NO_ANSWER if job.id else UNKNOWN)) for job in jobs]


def _question(job: SubmittedJob) -> str:
    """Return a shell command that answers with a line: the job's id, and what `parse` takes."""
    if job.tunnel is None:  # NeMo-Run ran it on this machine
        good, bad = (shlex.quote(f"{job.folder}/{name}") for name in (SUCCEEDED, FAILED))
        return (
            f"if [ -e {good} ]; then echo {job.id} {_LAST_WORDS}0; "
            f"elif [ -e {bad} ]; then echo {job.id} {_LAST_WORDS}1; "
            f"else echo {job.id} JobState=RUNNING; fi"
        )
    batch = f"{shlex.quote(job.folder)}/sbatch_*_{job.id}.out"
    sacct = f"timeout 5 sacct -X -n -P -j {job.id} -o State,ExitCode,Elapsed,NodeList"
    # Of a job that was queued again, the last words were not its last.
    return (
        f"said=$(scontrol -o show job {job.id} 2>&1) || case $said in "
        f"*'Invalid job id'*|*'Job {job.id} not found'*) said=$(grep -hs -e '^{_LAST_WORDS}' "
        f"-e 'is queued again$' -e '^{SETUP_FAILED}' {batch} | tail -n 1 | "
        f"grep -e '^{_LAST_WORDS}' -e '^{SETUP_FAILED}' || {sacct} 2>/dev/null | tail -n 1) ;; "
        f'*) said="{NO_ANSWER}: $(echo "$said" | tail -n 1)" ;; esac; echo {job.id} "$said"'
    )


def parse(answer: str) -> JobState:
    """Parse a line of ``scontrol -o show job``, of a batch script's end, or of sacct's."""
    if "JobState=" in answer:
        field = dict(re.findall(r"(\w+)=(\S*)", answer))
        reason = field.get("Reason", "None")
        return JobState(
            state=field["JobState"],
            restarts=int(field.get("Restarts", 0)),
            exit_code=_exit_code(field.get("ExitCode")),
            reason=None if reason == "None" else reason,
            nodes=field.get("NodeList"),
            elapsed=field.get("RunTime"),
        )
    if answer.startswith(_LAST_WORDS):
        code = int(answer.removeprefix(_LAST_WORDS))
        return JobState("FAILED" if code else "COMPLETED", exit_code=code)
    if answer.startswith(SETUP_FAILED):
        return JobState("FAILED", exit_code=1)
    if answer.startswith(NO_ANSWER):
        return JobState(NO_ANSWER, reason=answer.removeprefix(f"{NO_ANSWER}: ") or None)
    if "|" in answer:
        state, code, elapsed, nodes = answer.split("|")[:4]
        return JobState(
            state=state.split()[0],  # "CANCELLED by 1000"
            exit_code=_exit_code(code),
            nodes=nodes,
            elapsed=elapsed,
        )
    return JobState(UNKNOWN)


def _exit_code(text: str | None) -> int | None:
    """Return the exit code in Slurm's ``code:signal``; a signal counts as shells count it."""
    code, _, signal = (text or "").partition(":")
    if not code.isdigit():
        return None
    return int(code) or (128 + int(signal) if signal.isdigit() and int(signal) else 0)
