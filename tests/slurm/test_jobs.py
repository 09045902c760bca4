"""`proma launch`: what becomes of real jobs on a Slurm of two nodes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from support.command import ROOT
from support.losses import differences
from support.slurm import SlurmCluster, until
from support.slurm_jobs import (
    ALONE,
    QUICKSTART,
    SHORT,
    Launched,
    Launches,
    jobs_named,
    launching,
    printed,
)
from support.sshd import SshServer, missing_ssh, private_home_command

from proma_megatron.config.constants import EXIT_STOPPED
from proma_megatron.observability.metrics import read_metrics
from proma_megatron.processes.stopping import read_stop
from proma_megatron.runs.directory import RunDir

pytestmark = pytest.mark.slurm

SECRET = "hf_sentinel_7c1f0e5b"
_DIGEST = hashlib.sha256(SECRET.encode()).hexdigest()
_SEES_SECRET = f'test "$(printf %s "$HF_TOKEN" | sha256sum)" = "{_DIGEST}  -"'
PROBLEMS = ROOT / "configs" / "sample" / "validation.jsonl"


# --------------------------------------------------------------------------- what is launched


def _undisturbed(launches: Launches) -> Launched:
    site = launches.site("undisturbed")
    launched = launches.start("undisturbed", "slurm", QUICKSTART, "--cluster", site, *SHORT)
    # Others find in the shared bytecode what this one has compiled.
    until(lambda: launched.run_dir.metrics.exists() or launched.process.poll() is not None, 60)
    return launched


def _failing(launches: Launches) -> Launched:
    site = launches.site("failing", cpus_per_node=1)
    return launches.start(
        "failing",
        *("slurm", QUICKSTART, "--cluster", site, "--eval", PROBLEMS, *ALONE),
        "reward.function=support.slurm_rewards:failing",
    )


def _interrupted(launches: Launches) -> Launched:
    site = launches.site("interrupted", secrets=["HF_TOKEN"], more_setup=[_SEES_SECRET])
    return launches.start(
        "interrupted",
        *("slurm", QUICKSTART, "--cluster", site, "--detach", *SHORT),
        hold_after=1,
        environment={"HF_TOKEN": SECRET},
    )


def _spent(launches: Launches) -> Launched:
    site = launches.site("spent", cpus_per_node=1, max_requeues=0)
    return launches.start(
        "spent", "slurm", QUICKSTART, "--cluster", site, "--detach", *ALONE, hold_after=1
    )


def _unwanted(launches: Launches) -> Launched:
    site = launches.site("unwanted", cpus_per_node=1)
    return launches.start(
        "unwanted", "slurm", QUICKSTART, "--cluster", site, "--detach", *ALONE, hold_after=1
    )


# In the order of the tests that want them.
COMMANDS: dict[str, Callable[[Launches], Launched]] = {
    "undisturbed": _undisturbed,
    "failing": _failing,
    "interrupted": _interrupted,
    "spent": _spent,
    "unwanted": _unwanted,
}


@pytest.fixture(scope="module")
def launches(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launches]:
    with launching(cluster, tmp_path_factory.mktemp("launches")) as made:
        yield made


@pytest.fixture(scope="module")
def begun(
    launches: Launches, request: pytest.FixtureRequest
) -> Iterator[dict[str, Future[Launched]]]:
    """What the chosen tests need, all of it from the start on: a job begins while another ends.

    One command after the other, for each has to load NeMo-Run.
    """
    chosen = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}

    def begin(command: Callable[[Launches], Launched]) -> Launched:
        launched = command(launches)
        launched.submitted()
        return launched

    with ThreadPoolExecutor(1) as one:
        yield {name: one.submit(begin, COMMANDS[name]) for name in COMMANDS if name in chosen}
        one.shutdown(cancel_futures=True)


@pytest.fixture
def undisturbed(begun: dict[str, Future[Launched]]) -> Launched:
    return begun["undisturbed"].result()


@pytest.fixture
def failing(begun: dict[str, Future[Launched]]) -> Launched:
    return begun["failing"].result()


@pytest.fixture
def interrupted(begun: dict[str, Future[Launched]]) -> Launched:
    return begun["interrupted"].result()


@pytest.fixture
def spent(begun: dict[str, Future[Launched]]) -> Launched:
    return begun["spent"].result()


@pytest.fixture
def unwanted(begun: dict[str, Future[Launched]]) -> Launched:
    return begun["unwanted"].result()


# --------------------------------------------------------------------------- to the end


def test_the_quickstart_completes_over_two_nodes(
    undisturbed: Launched, cluster: SlurmCluster
) -> None:
    assert undisturbed.end() == 0, printed(undisturbed)
    job = cluster.job(undisturbed.job())
    assert (job["JobState"], job["NodeList"], job["NumTasks"]) == ("COMPLETED", "node[1-2]", "2")
    rows = [(row["phase"], row["step"]) for row in read_metrics(undisturbed.run_dir.metrics)]
    assert rows == [
        *(("warm_start", step) for step in (1, 2, 3, 4)),
        *(("rl", s) for s in range(5)),
    ]
    # It is followed by its log alone, once; what happens to the job is told beside it.
    lines = undisturbed.stdout.splitlines()
    assert sum(line.startswith("RL 4/4 ") for line in lines) == 1, undisturbed.stdout
    assert undisturbed.stderr.endswith("COMPLETED\n")


def test_a_job_that_fails_says_why_and_takes_the_next_one_along(
    failing: Launched, launches: Launches, cluster: SlurmCluster
) -> None:
    train, evaluation = failing.job(), failing.job("eval")
    assert failing.end() == 1, printed(failing)
    assert "ValueError: the answer key is lost" in failing.stdout
    state = cluster.job(train)
    assert (state["JobState"], state["Restarts"]) == ("FAILED", "0")
    after = cluster.job(evaluation)
    assert (after["JobState"], after["Reason"]) == ("CANCELLED", "DependencyNeverSatisfied")
    assert not list(launches.folder.rglob(f"*_{evaluation}*.out"))  # it never ran
    status = launches.run("status", failing.submitted())
    assert status.returncode == 1, status.stderr
    assert "FAILED" in status.stdout
    assert "CANCELLED" in status.stdout


# --------------------------------------------------------------------------- interrupted


def test_a_job_that_is_interrupted_again_and_again_loses_nothing(
    interrupted: Launched, undisturbed: Launched, launches: Launches, cluster: SlurmCluster
) -> None:
    job = interrupted.held(1)
    cluster.run("scontrol", "requeue", job)
    interrupted.hold(2)
    cluster.start_again(job)

    interrupted.held(2)
    assert cluster.job(job)["Restarts"] == "1"
    cluster.run("scancel", "--signal=USR1", job)  # as --signal does before the time limit
    interrupted.release()
    cluster.start_again(job)
    stop = read_stop(interrupted.run_dir.logs)
    assert stop is not None
    assert (stop.reason, stop.step) == ("SIGUSR1", 2)

    state = cluster.wait(job, ("COMPLETED", "FAILED", "CANCELLED"), 90)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "2"), printed(interrupted)
    assert undisturbed.end() == 0
    assert not differences(undisturbed.run_dir, interrupted.run_dir)

    logs = launches.run("logs", interrupted.submitted())
    assert logs.returncode == 0, logs.stderr
    attempts = [f"==> train, job {job}, attempt {number}: " for number in (0, 1, 2)]
    headings = [line for line in logs.stdout.splitlines() if ", attempt " in line]
    assert "Traceback" not in logs.stdout  # nor does torchrun take a stop for a failure
    assert len(headings) == len(attempts), logs.stdout
    first, rest = logs.stdout.split(attempts[1])
    second, third = rest.split(attempts[2])
    assert attempts[0] in first
    assert "warm start 1/4 " in first
    assert [step for step in range(1, 5) if f"RL {step}/4 " in first] == [1]
    assert [step for step in range(1, 5) if f"RL {step}/4 " in second] == [2]
    assert [step for step in range(1, 5) if f"RL {step}/4 " in third] == [3, 4]


def test_a_job_is_not_queued_again_more_often_than_allowed(
    spent: Launched, cluster: SlurmCluster
) -> None:
    job = spent.held(1)
    cluster.run("scancel", "--signal=USR1", job)
    spent.release()
    state = cluster.wait(job, ("COMPLETED", "FAILED", "CANCELLED", "PENDING"))
    assert (state["JobState"], state["Restarts"]) == ("FAILED", "0"), printed(spent)
    assert state["ExitCode"] == f"{EXIT_STOPPED}:0"
    assert read_stop(spent.run_dir.logs) is not None
    assert "max_requeues allows no more" in printed(spent)


def test_a_cancelled_job_stays_cancelled(
    unwanted: Launched, launches: Launches, cluster: SlurmCluster
) -> None:
    job = unwanted.held(1)
    done = launches.run("cancel", unwanted.submitted())
    unwanted.release()
    assert done.returncode == 0, done.stderr
    assert f"train, job {job}: C" in done.stderr  # COMPLETING, CANCELLED

    def over() -> bool:
        return not cluster.run("squeue", "-h", "-j", job).stdout.strip()

    # Ranks save now, and leave with what queues a job again that was not cancelled.
    assert until(over, 20)
    state = cluster.job(job)
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0"), printed(unwanted)


# --------------------------------------------------------------------------- secrets


def test_a_job_has_its_secrets_and_no_file_does(interrupted: Launched, launches: Launches) -> None:
    interrupted.held(1)  # its setup has compared what it got
    files = [path for path in launches.folder.rglob("*") if path.is_file()]
    assert any(path.name == "proma_job.yaml" for path in files)
    assert any(
        path.name.endswith("_sbatch.sh") and "HF_TOKEN" in path.read_text() for path in files
    )
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_without_its_secrets_nothing_is_submitted(
    launches: Launches, cluster: SlurmCluster
) -> None:
    site = launches.site("bare", secrets=["HF_TOKEN"])
    launched = launches.start(
        "bare",
        *("slurm", QUICKSTART, "--cluster", site, "--detach", *SHORT),
        environment={"HF_TOKEN": ""},
    )
    assert launched.end() == 2, printed(launched)
    assert launched.stdout == ""
    last = launched.stderr.splitlines()[-1]
    assert last.startswith("error: secrets lists HF_TOKEN, which this machine does not have")
    assert not jobs_named(cluster, ".bare.")
    assert not (launches.folder / "home" / "experiments" / "bare").exists()


# --------------------------------------------------------------------------- from elsewhere


def test_code_and_configuration_are_shipped_over_ssh(
    launches: Launches, cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = missing_ssh()
    if reason:
        pytest.skip(reason)
    there = launches.folder / "there"
    folder = launches.folder / "shipped"
    remote = {**launches.environment_of(folder), "HOME": str(launches.folder)}
    with SshServer(remote) as server:
        alone = private_home_command(server.known_hosts)
        if alone is None:
            pytest.skip("needs a mount namespace, so that ssh leaves the user's known_hosts alone")
        site = launches.site(
            "shipped",
            ssh={
                "host": server.host,
                "user": server.user,
                "port": server.port,
                "identity": str(server.identity),
                "job_dir": str(there),
            },
            code="working_tree",
            cpus_per_node=1,
            runs=None,
            environment={},
            more_setup=["export PYTHONPATH=tests"],  # of the code that was shipped
        )
        launched = launches.start(
            "shipped",
            *("slurm", QUICKSTART, "--cluster", site, *ALONE),
            *("trainer.steps=1", "reward.function=support.slurm_rewards:placed"),
            before=tuple(alone),
        )
        assert launched.end() == 0, printed(launched)
    assert cluster.job(launched.job())["JobState"] == "COMPLETED"
    assert "RL 1/1 " in launched.stdout
    run_dir = RunDir(there / "runs" / "shipped")
    assert read_metrics(run_dir.metrics)[-1]["step"] == 1
    place = Path((folder / "place").read_text())
    assert place.is_relative_to(there)
    (config,) = there.rglob("proma_job.yaml")
    assert config.is_relative_to(place.parent)


# --------------------------------------------------------------------------- on this machine


def test_the_same_stages_run_on_this_machine(launches: Launches) -> None:
    launched = launches.start(
        "local",
        *("local", QUICKSTART, "--export", *ALONE, "trainer.steps=1", f"root={launches.runs}"),
        environment={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    assert launched.end() == 0, printed(launched)
    assert launched.stderr.splitlines()[-2:] == ["train: SUCCEEDED", "export: SUCCEEDED"]
    assert (launched.run_dir.path / "export" / "config.json").exists()
