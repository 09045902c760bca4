"""The shell of jobs, run by bash among stand-ins for Slurm's programs and torchrun."""

import shlex
import signal
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import pytest
from support.launch import Programs

from proma_megatron.launching.nodes import Nodes
from proma_megatron.launching.scripts import local_script, node_script, setup_lines

# --------------------------------------------------------------------------- each node

TORCHRUN = r"""
printf '%s\n' "$@" > "$NOTES/arguments"
grep SigIgn /proc/self/status > "$NOTES/ignored"
[ -z "$STOPS" ] || echo '{}' > "$STOPS"
touch "$NOTES/started"
while [ -n "$WAITS" ] && [ ! -e "$NOTES/go" ]; do sleep 0.01; done
exit $CODE
"""
TRAIN = ("train", "/nemo_run/code/proma_job.yaml", "--resume-or-start")


class Node:
    """One node of a job, and what its torchrun noted."""

    def __init__(self, programs: Programs, folder: Path) -> None:
        self.programs = programs
        self.notes = folder / "notes"
        self.notes.mkdir()
        self.stopped = folder / "my $run's logs" / "stopped.json"
        self.stopped.parent.mkdir()
        programs.add("torchrun", TORCHRUN)

    def script(self, *arguments: str, resumes: bool = True) -> str:
        stopped = PurePosixPath(self.stopped) if resumes else None
        return node_script(arguments or TRAIN, Nodes(2, 4, 4), stopped=stopped)

    def environment(self, code: int = 0, stops: bool = False, node: int = 0) -> dict[str, str]:
        return {
            "NOTES": str(self.notes),
            "CODE": str(code),
            "STOPS": str(self.stopped) if stops else "",
            "SLURM_NODEID": str(node),
            "MASTER_ADDR": "10.0.0.7",
            "MASTER_PORT": "23456",
        }

    def end(
        self, code: int = 0, *, stops: bool = False, node: int = 0, resumes: bool = True
    ) -> int:
        done = self.programs.bash(
            self.script(resumes=resumes), **self.environment(code, stops, node)
        )
        assert done.stderr == ""
        return done.returncode


@pytest.fixture
def node(programs: Programs, tmp_path: Path) -> Node:
    return Node(programs, tmp_path)


@pytest.mark.parametrize(
    ("code", "stops", "end"),
    [
        (0, False, 0),
        (0, True, 75),
        (1, False, 1),
        (1, True, 75),
        (143, True, 75),
        (143, False, 143),
    ],
)
def test_75_means_that_ranks_said_that_they_stopped(
    node: Node, code: int, stops: bool, end: int
) -> None:
    assert node.end(code, stops=stops) == end


def test_that_the_attempt_before_stopped_says_nothing_of_this_one(node: Node) -> None:
    node.stopped.write_text("{}")
    assert node.end(1) == 1


def test_only_the_first_node_removes_what_the_attempt_before_left(node: Node) -> None:
    """A late node would remove what ranks of this attempt have left."""
    node.stopped.write_text("{}")
    assert node.end(0, node=1) == 0  # nor does it believe what its cache may show
    assert node.stopped.exists()
    assert node.end(0, node=0) == 0
    assert not node.stopped.exists()


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_what_can_not_go_on_ends_as_torchrun_does(node: Node, code: int) -> None:
    node.stopped.write_text("{}")  # of the training, which this stage only reads
    assert node.end(code, resumes=False) == code
    assert node.stopped.exists()


@pytest.mark.parametrize("resumes", [True, False])
def test_the_shell_outlives_signals_to_tell_how_the_ranks_ended(node: Node, resumes: bool) -> None:
    environment = {**node.environment(code=7), "WAITS": "yes"}
    shell = node.programs.start(node.script(resumes=resumes), **environment)
    deadline = time.monotonic() + 10
    while not (node.notes / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        shell.send_signal(number)
        time.sleep(0.05)
        assert shell.poll() is None
    (node.notes / "go").touch()
    assert shell.wait(10) == 7
    shell.communicate()


@pytest.mark.parametrize("resumes", [True, False])
def test_torchrun_ignores_signals_that_are_for_ranks_and_no_others(
    node: Node, resumes: bool
) -> None:
    """Ranks that can't stop are to end by SIGTERM, as anything does."""
    node.end(resumes=resumes)
    ignored = int((node.notes / "ignored").read_text().split()[1], 16)
    assert ignored & 1 << (signal.SIGUSR1 - 1)
    assert bool(ignored & 1 << (signal.SIGTERM - 1)) is resumes
    assert not ignored & 1 << (signal.SIGHUP - 1)


def test_torchrun_is_told_where_ranks_meet_and_gets_each_argument_as_it_is(node: Node) -> None:
    odd = "/data/a b/$HOME 'x' \"y\".yaml"
    done = node.programs.bash(node.script("train", odd, "a=*"), **node.environment(node=1))
    assert done.returncode == 0, done.stderr
    assert (node.notes / "arguments").read_text().splitlines() == [
        "--nnodes=2",
        "--node-rank=1",
        "--master-addr=10.0.0.7",
        "--master-port=23456",
        "--nproc-per-node=4",
        "--signals-to-handle=SIGHUP,SIGQUIT",
        "-m",
        "proma_megatron.cli",
        "train",
        odd,
        "a=*",
    ]


# --------------------------------------------------------------------------- on this machine


class Here:
    """Stages on this machine, whose scripts NeMo-Run puts into a folder for each."""

    def __init__(self, node: Node, folder: Path) -> None:
        self.node = node
        self.jobs = folder / "jobs"

    def end(
        self, stage: str, *, after: str | None = None, code: int = 0, stops: bool = False
    ) -> tuple[int, str]:
        path = self.jobs / stage / "scripts" / f"{stage}.sh"
        path.parent.mkdir(parents=True, exist_ok=True)
        stopped = PurePosixPath(self.node.stopped) if after is None else None
        path.write_text(local_script(TRAIN, Nodes(1, 2, 0), stopped=stopped, after=after))
        environment = self.node.environment(code, stops)
        done = self.node.programs.bash(f"exec bash {shlex.quote(str(path))}", **environment)
        assert done.stderr == ""
        return done.returncode, done.stdout


@pytest.fixture
def here(node: Node, tmp_path: Path) -> Here:
    return Here(node, tmp_path)


def test_a_stage_is_started_once_that_succeeded_which_it_depends_on(here: Here) -> None:
    refused = (1, "not started, for train has not succeeded\n")
    assert here.end("export", after="train") == refused
    assert here.end("train", code=1) == (1, "")
    assert here.end("export", after="train") == refused
    assert here.end("train", code=1, stops=True) == (75, "")
    assert here.end("export", after="train") == refused
    assert here.end("train") == (0, "")
    assert here.end("export", after="train") == (0, "")


def test_on_one_machine_torchrun_finds_a_port_itself(here: Here) -> None:
    here.end("train")
    words = (here.node.notes / "arguments").read_text().splitlines()
    assert words[:2] == ["--standalone", "--nproc-per-node=2"]


def test_on_this_machine_too_only_this_attempt_counts(here: Here) -> None:
    here.node.stopped.write_text("{}")
    assert here.end("train", code=1) == (1, "")


# --------------------------------------------------------------------------- the batch script

SCONTROL = r"""
case "$*" in
  "show hostnames node[7-8]") echo node7; echo node8 ;;
  "-o show node node7") echo "NodeName=node7 Arch=x86_64 $ADDRESS NodeHostName=h7 Version=22.05" ;;
  requeue*) echo "$*" >> "$NOTES" ;;
  "-o show job "*) echo "JobId=4711 ${STATE:-JobState=RUNNING Reason=None} Restarts=0" ;;
  *) echo "scontrol: error: $*" >&2; exit 1 ;;
esac
"""


class Batch:
    """What surrounds the nodes of a job."""

    def __init__(self, programs: Programs, folder: Path) -> None:
        self.programs = programs
        self.notes = folder / "requeued"
        programs.add("scontrol", SCONTROL)

    def run(
        self,
        body: str,
        site: tuple[str, ...] = (),
        variables: dict[str, str] | None = None,
        *,
        max_requeues: int = 2,
        requeue_failures: int = 0,
        environment: Mapping[str, str] | None = None,
    ) -> tuple[int, str]:
        lines = setup_lines(
            site, variables or {}, max_requeues=max_requeues, requeue_failures=requeue_failures
        )
        around = {
            "NOTES": str(self.notes),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "ADDRESS": "NodeAddr=10.0.0.7",
            **(environment or {}),
        }
        done = self.programs.bash(f"{lines}\n{body}\n", **around)
        assert done.stderr == ""
        return done.returncode, done.stdout

    def address(self, **environment: str) -> list[str]:
        code, said = self.run("printenv MASTER_ADDR MASTER_PORT", environment=environment)
        assert code == 0
        return said.splitlines()


@pytest.fixture
def batch(programs: Programs, tmp_path: Path) -> Batch:
    return Batch(programs, tmp_path)


@pytest.mark.parametrize(
    ("code", "attempt", "max_requeues", "requeue_failures", "again"),
    [
        (75, None, 2, 0, True),
        (75, 0, 2, 0, True),
        (75, 1, 2, 0, True),
        (75, 2, 2, 0, False),
        (75, 0, 0, 5, False),
        (1, 0, 2, 0, False),
        (137, 0, 2, 0, False),
        (1, 0, 2, 1, True),
        (1, 1, 2, 1, False),
        (0, 0, 2, 2, False),
        (0, None, 2, 2, False),
    ],
)
def test_a_job_is_queued_again_when_it_stopped_as_often_as_the_cluster_file_says(
    batch: Batch,
    code: int,
    attempt: int | None,
    max_requeues: int,
    requeue_failures: int,
    again: bool,
) -> None:
    environment = {} if attempt is None else {"SLURM_RESTART_COUNT": str(attempt)}
    end, said = batch.run(
        f"exit {code}",
        max_requeues=max_requeues,
        requeue_failures=requeue_failures,
        environment=environment,
    )
    assert end == code
    assert (batch.notes.read_text() if batch.notes.exists() else "") == (
        "requeue 4711\n" if again else ""
    )
    if again:
        said_then = f"proma: attempt {attempt or 0} ended with code {code} and is queued again\n"
    elif code == 75:
        said_then = (
            f"proma: stopped in attempt {attempt}; max_requeues allows no more, submit again\n"
        )
    else:
        said_then = ""
    assert said == said_then


@pytest.mark.parametrize("line", ["false", "cd /no/such 2>/dev/null", "test \"a  'b'\" = '$c'"])
def test_a_line_of_the_site_that_fails_ends_the_job_and_is_named(batch: Batch, line: str) -> None:
    code, said = batch.run("echo ranks", ("true", line, "echo not reached"))
    assert (code, said) == (1, f"proma: setup failed at: {line}\n")


def test_lines_of_the_site_act_on_the_job(batch: Batch) -> None:
    code, said = batch.run('echo "$ROOT_OF_MODULES"', ("export ROOT_OF_MODULES='a  b'", "# note"))
    assert (code, said) == (0, "a  b\n")


def test_values_arrive_as_they_are(batch: Batch) -> None:
    odd = "a  b 'c' \"d\" $HOME `e` \\ ! *"
    code, said = batch.run("printenv http_proxy", variables={"http_proxy": odd})
    assert (code, said) == (0, f"{odd}\n")


def test_the_site_s_lines_see_its_variables(batch: Batch) -> None:
    code, said = batch.run("true", ('echo "$http_proxy"',), {"http_proxy": "here"})
    assert (code, said) == (0, "here\n")


def test_ranks_meet_at_the_first_node_by_the_address_that_slurm_reaches_it_at(batch: Batch) -> None:
    assert batch.address()[0] == "10.0.0.7"


def test_without_an_address_ranks_meet_at_its_name(batch: Batch) -> None:
    assert batch.address(ADDRESS="")[0] == "node7"


def test_jobs_and_attempts_have_ports_of_their_own(batch: Batch) -> None:
    ports = [
        batch.address(SLURM_JOB_ID=job, **attempt)[1]
        for job in ("9998", "10000", "4294967293")
        for attempt in ({}, {"SLURM_RESTART_COUNT": "1"})
    ]
    assert len(set(ports)) == 6
    assert all(20000 <= int(port) <= 29999 for port in ports)
    assert batch.address(SLURM_JOB_ID="5")[1] != batch.address(SLURM_JOB_ID="6")[1]


def test_an_attempt_without_a_count_is_the_first(batch: Batch) -> None:
    assert batch.address() == batch.address(SLURM_RESTART_COUNT="0")


def test_a_line_that_ends_in_a_comment_is_checked_too(batch: Batch) -> None:
    assert batch.run("echo ranks", ("false  # why",))[0] == 1


@pytest.mark.parametrize(
    ("state", "code", "again"),
    [
        ("JobState=RUNNING Reason=None", 75, True),
        ("JobState=COMPLETING Reason=None", 75, False),  # cancelled: it saved, and stays so
        ("JobState=COMPLETING Reason=None", 0, False),
        ("JobState=COMPLETING Reason=TimeLimit", 0, True),  # in the middle of a long step
        ("JobState=COMPLETING Reason=TimeLimit", 75, True),
    ],
)
def test_what_the_time_limit_ended_goes_on_and_what_was_cancelled_does_not(
    batch: Batch, state: str, code: int, again: bool
) -> None:
    batch.run(f"exit {code}", environment={"STATE": state})
    assert batch.notes.exists() is again
