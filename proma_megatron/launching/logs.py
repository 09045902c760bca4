"""Logs of jobs, of every attempt, as they are or as they grow."""

from __future__ import annotations

import base64
import binascii
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from proma_megatron.errors import UnreachableError
from proma_megatron.launching.connection import Connection
from proma_megatron.launching.states import NO_ANSWER, UNKNOWN, JobState, ask
from proma_megatron.launching.submitted import SubmittedJob

# Of what the batch script prints, with the shell's own trace, only this is for the user.
_TELLING = ("proma:", "srun: error", "slurmstepd: error", "sbatch: error", "scontrol: error")
_GIVE_UP = 10  # answers in a row that a job is unknown
_PIECE = 4 * 2**20  # bytes


@dataclass(frozen=True)
class LogFile:
    """What one attempt of a job has printed so far."""

    path: str
    attempt: int | None  # None: the batch script itself, in all attempts
    size: int  # bytes


def log_files(connection: Connection, job: SubmittedJob) -> list[LogFile]:
    """Return the logs of a job: those of each attempt, then the batch script's.

    Raises:
        UnreachableError: the cluster can't be asked.
    """
    if not job.id:
        return []
    folder = shlex.quote(job.folder)
    if job.tunnel is None:  # NeMo-Run ran it on this machine
        names = f"{folder}/nemo_run/{job.id}/*/0/combined.log"
    else:
        names = f"{folder}/sbatch_*_{job.id}.out {folder}/log-*_{job.id}_*.out"
    found = []
    for line in connection.run(f"stat -c '%s %n' {names} 2>/dev/null").splitlines():
        size, _, path = line.partition(" ")
        if not (size.isdigit() and path.startswith("/")):
            continue  # what a login shell prints of itself
        last = path.rpartition("_")[2].removesuffix(".out")
        batch = path.rpartition("/")[2].startswith("sbatch_")
        attempt = 0 if job.tunnel is None else int(last)
        found.append(LogFile(path, None if batch else attempt, int(size)))
    return sorted(found, key=lambda file: (file.attempt is None, file.attempt))


def read(connection: Connection, path: str, start: int) -> Iterator[bytes]:
    """Yield a file from byte ``start`` on, in pieces, as it is, whatever that means as text.

    To its end, not to the size that was listed: a network file system may have told an old one.

    Raises:
        UnreachableError: the cluster can't be asked, or its shell prints of itself.
    """
    while True:
        cut = f"tail -c +{start + 1} {shlex.quote(path)} | head -c {_PIECE}"
        try:
            piece = base64.b64decode(connection.run(f"{cut} | base64 -w 0"), validate=True)
        except binascii.Error:
            raise UnreachableError("a login shell that prints of itself hides the logs") from None
        yield piece
        start += len(piece)
        if len(piece) < _PIECE:
            return


def show(
    connection: Connection, jobs: Iterable[SubmittedJob], *, batch: bool = False
) -> Iterator[str]:
    """Yield lines of the logs of all attempts, under headings.

    Args:
        batch: also what the batch script printed, with the trace of its shell.

    Raises:
        UnreachableError: the cluster can't be asked.
    """
    for job in jobs:
        for file in log_files(connection, job):
            lines = _lines(b"".join(read(connection, file.path, 0)))
            if file.attempt is None and not batch:
                lines = [line for line in lines if line.startswith(_TELLING)]
                if not lines:
                    continue
            what = "batch script" if file.attempt is None else f"attempt {file.attempt}"
            yield f"==> {job.name}, job {job.id}, {what}: {file.path}"
            yield from lines


def _lines(text: bytes) -> list[str]:
    return text.decode(errors="replace").splitlines()


@dataclass
class _Reader:
    """Lines of the logs of one job that were not shown yet."""

    job: SubmittedJob
    shown: dict[str, int] = field(default_factory=dict)  # bytes of each file
    begun: dict[str, bytes] = field(default_factory=dict)  # the line that is not complete yet

    def lines(self, connection: Connection, *, last: bool = False) -> Iterator[str]:
        for file in log_files(connection, self.job):
            start = self.shown.get(file.path, 0)
            text = self.begun.get(file.path, b"")
            if file.size > start or last:
                new = b"".join(read(connection, file.path, start))
                text, start = text + new, start + len(new)
            complete, _, rest = (text, b"", b"") if last else text.rpartition(b"\n")
            self.shown[file.path], self.begun[file.path] = start, rest
            for line in _lines(complete):
                if file.attempt is not None or line.startswith(_TELLING):
                    yield line


def follow(
    connection: Connection,
    jobs: Sequence[SubmittedJob],
    *,
    seconds: float,
    say: Callable[[str], None],
) -> list[JobState]:
    """Print the logs of jobs as they grow, until all are over; return what became of each.

    A cluster that does not answer for a while is asked again. A job that it does not know any more
    is given up, with the state `UNKNOWN`.

    Args:
        seconds: between questions.
        say: takes what happens to jobs, line by line.
    """
    readers = [_Reader(job) for job in jobs]
    states = [JobState(NO_ANSWER) for _ in jobs]
    unknown = [0] * len(jobs)  # answers in a row
    silent = False
    while True:
        try:
            # First the states: what a job printed before it ended is then there to be read.
            now = ask(connection, jobs)
            for place, (reader, state) in enumerate(zip(readers, now, strict=True)):
                before = states[place]
                if before.over or unknown[place] == _GIVE_UP:
                    continue
                if state.state == NO_ANSWER:
                    raise UnreachableError(f"Slurm does not answer: {state.reason}")
                answers = unknown[place] + 1 if state.state == UNKNOWN else 0
                over = state.over or answers == _GIVE_UP
                for line in reader.lines(connection, last=over):
                    prefix = f"{reader.job.name} | " if len(jobs) > 1 else ""
                    print(f"{prefix}{line}", flush=True)
                states[place], unknown[place] = state, answers
                if (state.state, state.restarts) != (before.state, before.restarts):
                    say(f"{reader.job.name}, job {reader.job.id}: {state}")
            silent = False
        except UnreachableError as error:
            if not silent:
                say(f"{error}; jobs go on, and this waits")
            silent = True
        pairs = zip(states, unknown, strict=True)
        if all(state.over or answers == _GIVE_UP for state, answers in pairs):
            return states
        time.sleep(seconds)
