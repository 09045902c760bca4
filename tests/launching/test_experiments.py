"""Experiments, up to the programs of Slurm, in whose place others stand here."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.launch import Programs, Submitting, files_of, make_key, site, unused_port

from proma_megatron.config.run import RunConfig
from proma_megatron.errors import ConfigError, LaunchError, UnreachableError
from proma_megatron.launching.cluster import Cluster
from proma_megatron.launching.experiments import build, dry_run, submit
from proma_megatron.launching.local import run_here
from proma_megatron.launching.stages import Stage, stages_of
from proma_megatron.launching.submitted import find

SENTINEL = "a-sentinel-that-nobody-may-see"


def stages(name: str = "run", *, root: str = "/runs", export: bool = False) -> list[Stage]:
    config = RunConfig(name=name, root=Path(root))
    return stages_of([config], export="export" if export else None)


@pytest.fixture
def slurm(programs: Programs, monkeypatch: pytest.MonkeyPatch, temporary: Path) -> Submitting:
    return Submitting(programs, monkeypatch)


# --------------------------------------------------------------------------- the batch script

# The first of them only asks for the name of a node.
SRUN = r"""
case "$*" in *"hostname --ip-address") echo 127.0.1.1; exit ;; esac
printf '%s\n' "$@" > "$NOTES/srun"
env -0 > "$NOTES/environment"
[ ! -t 1 ] && exit $CODE
"""
SCONTROL = r"""
case "$1" in
  requeue) echo "$2" >> "$NOTES/requeued" ;;
  show) echo node7 ;;
  -o) [ "$3" = node ] || { echo "JobId=1 ${STATE:-JobState=RUNNING Reason=None} Restarts=0"; exit; }
    echo "NodeName=node7 NodeAddr=10.0.0.7 X=y" ;;
esac
"""


class Batch:
    """The batch script of a training as NeMo-Run writes it, run by bash."""

    def __init__(self, programs: Programs, notes: Path) -> None:
        self.programs = programs
        self.notes = notes
        notes.mkdir()
        programs.add("srun", SRUN)
        programs.add("scontrol", SCONTROL)

    def run(self, cluster: Cluster, code: int = 0, attempt: int = 0) -> tuple[int, list[str]]:
        """Exit code, and lines of standard output."""
        (script,) = dry_run("run", stages(), cluster, id="run_1")
        done = self.programs.bash(
            script.batch,
            NOTES=str(self.notes),
            CODE=str(code),
            SLURM_JOB_ID="4711",
            SLURM_JOB_NODELIST="node7",
            SLURM_RESTART_COUNT=str(attempt),
            HF_TOKEN=SENTINEL,
        )
        assert SENTINEL not in done.stdout + done.stderr
        return done.returncode, done.stdout.splitlines()

    @property
    def environment(self) -> dict[str, str]:
        """What nodes of the job are started with."""
        pairs = (self.notes / "environment").read_text().split("\0")
        return dict(pair.split("=", 1) for pair in pairs if "=" in pair)

    @property
    def requeued(self) -> bool:
        return (self.notes / "requeued").exists()


@pytest.fixture
def batch(programs: Programs, tmp_path: Path, repository: Path, home: Path) -> Batch:
    return Batch(programs, tmp_path / "notes")


@pytest.mark.parametrize(
    ("code", "attempt", "requeued"),
    [(0, 0, False), (75, 1, True), (75, 2, False)],
)
def test_a_job_ends_as_its_nodes_do_and_is_queued_again_if_they_stopped(
    batch: Batch, code: int, attempt: int, requeued: bool
) -> None:
    end, lines = batch.run(site(max_requeues=2), code, attempt)
    assert end == code
    assert f"job exited with code {code}" in lines  # what `states` looks for
    assert batch.requeued == requeued


def test_a_failure_is_queued_again_only_if_the_cluster_file_says_so(batch: Batch) -> None:
    assert batch.run(site(requeue_failures=1), 1, attempt=1)[0] == 1
    assert not batch.requeued
    assert batch.run(site(requeue_failures=1), 1, attempt=0)[0] == 1
    assert batch.requeued


def test_nodes_are_not_started_after_a_setup_that_failed(batch: Batch) -> None:
    end, lines = batch.run(site(setup=["false"]))
    assert end == 1
    assert lines[-1] == "proma: setup failed at: false"
    assert not (batch.notes / "srun").exists()


ODD = ["a  b", "`x`", "'a' \"b\"", "\\n !*?#;&|", "ü", ""]


def test_values_of_variables_reach_the_nodes_as_they_are(batch: Batch) -> None:
    capital = {f"ODD_{number}": value for number, value in enumerate(ODD)}
    mixed = {f"odd_{number}": value for number, value in enumerate(ODD)}
    given = {**capital, **mixed, "NUMBER": 3, "Mixed_Case": "x y"}
    assert batch.run(site(environment=given))[0] == 0
    found = batch.environment
    assert {name: found.get(name) for name in given} == {**given, "NUMBER": "3"}
    assert found["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert found["HF_TOKEN"] == SENTINEL


def test_the_cluster_file_prevails_over_proma_s_own_variables(batch: Batch) -> None:
    batch.run(site(environment={"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": 4}))
    assert batch.environment["NCCL_DEBUG"] == "INFO"
    assert batch.environment["OMP_NUM_THREADS"] == "4"


def test_nodes_know_where_ranks_meet(batch: Batch) -> None:
    batch.run(site())
    assert batch.environment["MASTER_ADDR"] == "10.0.0.7"
    assert batch.environment["MASTER_PORT"] == "25811"


def test_further_arguments_reach_srun(batch: Batch) -> None:
    batch.run(site(srun=["--mpi=pmix", "--cpu-bind=none"]))
    words = (batch.notes / "srun").read_text().splitlines()
    assert {"--mpi=pmix", "--cpu-bind=none"} <= set(words)
    assert words[-2] == "bash"
    assert words[-1].endswith("/run/run_1/train/scripts/train.sh")


def test_a_dry_run_leaves_nothing_behind(repository: Path, home: Path, temporary: Path) -> None:
    before = files_of(repository)
    dry_run("run", stages(export=True), site(), id="run_1")
    assert not home.exists()
    assert not list(temporary.iterdir())
    assert files_of(repository) == before


# --------------------------------------------------------------------------- secrets


def test_secrets_are_nowhere_in_what_a_dry_run_writes(
    repository: Path,
    home: Path,
    temporary: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", SENTINEL)
    container = {"image": "/proma.sqsh", "mounts": ["/runs:/runs"]}
    cluster = site(secrets=["HF_TOKEN"], container=container, runs="/runs")
    with build("run", stages(export=True), cluster, id="run_1", base_dir=tmp_path) as made:
        made.dryrun(log=True, delete_exp_dir=False)
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert any(path.name == "train_sbatch.sh" for path in written)
        assert any(path.is_relative_to(temporary) for path in written)
        for path in written:
            assert SENTINEL.encode() not in path.read_bytes(), path
    assert SENTINEL not in "".join(capfd.readouterr())


def test_secrets_reach_sbatch_by_its_environment_alone(
    slurm: Submitting,
    repository: Path,
    home: Path,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", SENTINEL)
    submit("run", stages(export=True), site(secrets=["HF_TOKEN"]), id="run_1")
    assert slurm.environment("HF_TOKEN") == SENTINEL
    assert SENTINEL not in "".join(capfd.readouterr())
    written = [path for path in (*home.rglob("*"), *temporary.rglob("*")) if path.is_file()]
    assert written
    for path in written:
        assert SENTINEL.encode() not in path.read_bytes(), path


# --------------------------------------------------------------------------- submitted


def test_stages_are_submitted_with_what_they_depend_on(
    slurm: Submitting, repository: Path, home: Path
) -> None:
    assert submit("run", stages(export=True), site(), id="run_1") == "run_1"
    folder = home / "experiments" / "run" / "run_1"
    assert slurm.submitted == [
        f"--requeue --parsable {folder}/train_sbatch.sh",
        f"--requeue --parsable --dependency=afterok:101 {folder}/export_sbatch.sh",
    ]
    code = folder / "train" / "code"
    assert (code / "proma_job.yaml").is_file()
    assert (code / "launch" / "__init__.py").is_file()


def test_what_was_submitted_is_found_again(slurm: Submitting, repository: Path, home: Path) -> None:
    submit("run", stages(export=True), site(), id="run_1")
    submit("run", stages(), site(), id="run_2")
    submit("other", stages("other"), site(), id="other_3")
    assert find(None).id == "other_3"
    assert find("run").id == "run_2"
    assert find("run_2").id == "run_2"
    found = find("run_1")
    assert [(job.name, job.id, job.after) for job in found.jobs] == [
        ("train", "101", ()),
        ("export", "102", ("train",)),
    ]
    assert found.jobs[0].folder == str(home / "experiments" / "run" / "run_1" / "train")
    assert found.jobs[0].tunnel is not None


def test_what_was_never_submitted_is_not_found(
    slurm: Submitting, repository: Path, home: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        find(None)
    folder = home / "experiments"
    assert str(caught.value) == f"there is no experiment in {folder}; the newest are: none yet"
    submit("run", stages(), site(), id="run_1")
    with pytest.raises(ConfigError) as caught:
        find("runn")
    assert str(caught.value) == f"'runn' is no experiment in {folder}; the newest are: run_1"


def test_two_experiments_of_one_second_have_records_of_their_own(
    slurm: Submitting, repository: Path, home: Path
) -> None:
    first, second = (submit("run", stages(), site()) for _ in range(2))
    assert first != second
    assert re.fullmatch(r"run_\d{8}-\d{6}", second)


def test_when_a_job_is_refused_those_before_it_are_taken_back(
    slurm: Submitting, repository: Path, home: Path
) -> None:
    slurm.accept(1)
    with pytest.raises(LaunchError) as caught:
        submit("run", stages(export=True), site(), id="run_1")
    sentence = str(caught.value)
    assert sentence == (
        "nothing was submitted, for this machine says: sbatch: error: Invalid account"
    )
    assert slurm.cancelled == ["101"]


def test_of_a_sweep_no_job_stays_when_one_is_refused(
    slurm: Submitting, repository: Path, home: Path
) -> None:
    slurm.accept(2)
    configs = [RunConfig(name=name, root=Path("/runs")) for name in "abc"]
    with pytest.raises(LaunchError):
        submit("run", stages_of(configs), site(), id="run_1")
    assert [sorted(call.split()) for call in slurm.cancelled] == [["101", "102"]]
    assert not list((home / "experiments" / "run").iterdir())


def test_jobs_that_can_not_be_taken_back_are_named_and_can_be_cancelled_later(
    slurm: Submitting, repository: Path, home: Path, programs: Programs
) -> None:
    slurm.accept(1)
    programs.add("scancel", "echo 'scancel: error: Access denied' >&2; exit 1")
    with pytest.raises(LaunchError) as caught:
        submit("run", stages(export=True), site(), id="run_1")
    assert str(caught.value) == (
        "jobs 101 of run_1 are still there, for this machine says: sbatch: error: Invalid account"
    )
    assert [(job.name, job.id) for job in find("run_1").jobs] == [("train", "101"), ("export", "")]


def test_variables_that_outrank_the_batch_script_are_refused(
    slurm: Submitting, repository: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_ACCOUNT", "another")
    with pytest.raises(ConfigError, match="this machine has SBATCH_ACCOUNT in its environment"):
        submit("run", stages(), site())
    assert not slurm.submitted


# --------------------------------------------------------------------------- not submitted


@pytest.mark.parametrize("set_to", [None, ""])
def test_a_secret_that_is_not_set_is_named_before_anything_is_written(
    slurm: Submitting,
    repository: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    set_to: str | None,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "x")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if set_to is not None:
        monkeypatch.setenv("WANDB_API_KEY", set_to)
    with pytest.raises(ConfigError) as caught:
        submit("run", stages(), site(secrets=["HF_TOKEN", "WANDB_API_KEY"]))
    assert str(caught.value) == (
        "secrets lists WANDB_API_KEY, which this machine does not have in its environment; set it "
        "in this shell, or take it off the list"
    )
    assert not slurm.submitted
    assert not home.exists()


def test_without_slurm_nothing_is_written(slurm: Submitting, repository: Path, home: Path) -> None:
    slurm.remove()
    with pytest.raises(ConfigError) as caught:
        submit("run", stages(), site())
    assert str(caught.value) == (
        "there is no sbatch on this machine; run this on a login node of the cluster, or add an "
        "ssh section to the cluster file"
    )
    assert not home.exists()


def test_a_host_that_can_not_be_reached_is_named_and_nothing_is_written(
    repository: Path, home: Path, tmp_path: Path
) -> None:
    port = unused_port()
    ssh = {"host": "127.0.0.1", "port": port, "user": "ada", "job_dir": "/jobs"}
    with pytest.raises(UnreachableError) as caught:
        submit("run", stages(), site(ssh={**ssh, "identity": str(make_key(tmp_path / "key"))}))
    sentence = str(caught.value)
    assert sentence.startswith(f"ada@127.0.0.1, port {port}, can't be reached: ")
    assert sentence.endswith("; check ssh.host and ssh.port of the cluster file, and the network")
    assert "\n" not in sentence
    assert not home.exists()


def test_a_key_that_is_not_there_is_named(repository: Path, home: Path, tmp_path: Path) -> None:
    key = tmp_path / "no key"
    ssh = {"host": "127.0.0.1", "port": 1, "user": "ada", "job_dir": "/jobs", "identity": str(key)}
    with pytest.raises(ConfigError) as caught:
        submit("run", stages(), site(ssh=ssh))
    assert str(caught.value) == (
        f"ssh.identity is {key}, expected a private key that exists; check the path"
    )
    assert not home.exists()


def test_a_layout_that_does_not_fit_is_refused_before_anything_is_written(
    repository: Path, home: Path, temporary: Path
) -> None:
    config = RunConfig.model_validate({"name": "run", "parallel": {"data": 3}})
    with pytest.raises(ConfigError, match="3 ranks, expected at most 2 or a multiple of it"):
        dry_run("run", stages_of([config]), site())
    assert not home.exists()
    assert not list(temporary.iterdir())


# --------------------------------------------------------------------------- on this machine

TORCHRUN = r"""
echo "torchrun $*"
case "$*" in *" $FAILS "*) exit 3 ;; esac
"""


@pytest.fixture
def here(programs: Programs, monkeypatch: pytest.MonkeyPatch, home: Path, temporary: Path) -> Any:
    """Runs stages of which the named ones fail; what became of each."""
    programs.add("torchrun", TORCHRUN)
    monkeypatch.setattr(
        "proma_megatron.launching.executors.sysconfig",
        SimpleNamespace(get_path=lambda _: str(programs.folder)),
    )

    def run(fails: str, of: list[Stage]) -> dict[str, str]:
        monkeypatch.setenv("FAILS", fails)
        return run_here("run", of)

    return run


@pytest.mark.ranks
def test_a_stage_whose_parent_failed_is_not_started(here: Any, home: Path, tmp_path: Path) -> None:
    states = here("train", stages(root=str(tmp_path), export=True))
    assert states == {"train": "FAILED", "export": "FAILED"}
    # The terminal shows it, too, unless the stage ends before NeMo-Run has found its log.
    said = "".join(log.read_text() for log in home.rglob("stdout.log"))
    assert "not started, for train has not succeeded" in said
    assert "proma_megatron.cli train" in said
    assert "proma_megatron.cli export" not in said


def test_an_id_that_would_not_be_found_again_is_refused() -> None:
    train = stages_of([RunConfig(name="quickstart")])
    with pytest.raises(ConfigError, match="id is mine, expected 'quickstart_' and more"):
        dry_run("quickstart", train, site(code="image"), id="mine")


def test_folders_that_nemo_run_would_take_apart_are_refused() -> None:
    train = stages_of([RunConfig(name="quickstart")])
    ssh = {"host": "login", "user": "ada", "job_dir": "/scratch/ada/nemo_run"}
    with pytest.raises(
        ConfigError, match=r"ssh\.job_dir contains /nemo_run, which NeMo-Run replaces"
    ):
        dry_run("quickstart", train, site(code="image", ssh=ssh))
    with pytest.raises(ConfigError, match="runs contains /nemo_run"):
        dry_run("quickstart", train, site(code="image", runs="/nemo_run/runs"))
