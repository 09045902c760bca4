"""`proma launch`: what it prints, its exit codes, and what it leaves alone when it refuses."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.command import proma_here as proma
from support.launch import (
    CLUSTERS,
    ROOT,
    SSH,
    Programs,
    Submitting,
    cluster_file,
    git,
    make_key,
    unused_port,
)

QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@pytest.fixture
def around(
    repository: Path, home: Path, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder to be in, from which nothing of this machine is changed."""
    folder = tmp_path / "around"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def slurm(around: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch) -> Submitting:
    found = Submitting(programs, monkeypatch)
    programs.add("scontrol", 'echo "JobState=RUNNING Restarts=1 RunTime=00:01:00 NodeList=node1"')
    return found


def refused(done: subprocess.CompletedProcess[str], home: Path, code: int = 2) -> str:
    """The sentence of a command that did nothing."""
    assert done.returncode == code
    assert done.stdout == ""
    *_, last = done.stderr.splitlines()
    assert last.startswith("error: ")
    assert not home.exists()
    return last.removeprefix("error: ")


@pytest.mark.parametrize(
    ("keys", "words", "part"),
    [
        ({"acount": "x"}, (), "unknown key 'acount'; did you mean 'account'?"),
        ({"account": None}, (), "'account' is missing; add it"),
        ({"partition": "$(x)"}, (), "partition is '$(x)', but"),
        ({"time": 3600}, (), "in quotes, without which YAML reads a number"),
        ({"gpus_per_node": 3}, ("parallel.data=4",), "= 2 x 1 x 4 = 8 ranks, expected at most 3"),
        ({}, ("trainer.stepz=3",), "unknown key 'trainer.stepz'"),
        ({}, ("--sweep", "seed"), "--sweep is 'seed', expected key=value,value"),
        ({}, ("--samples", "3"), "--samples is 3, but there is no --eval; add a file of problems"),
        ({}, ("--eval", "none.jsonl"), "--eval is none.jsonl, which is relative"),
        ({"ssh": SSH}, ("data.train_file=x", "data.validation_file=y"), "data.train_file is x,"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dry", [True, False], ids=["dry", "real"])
def test_what_does_not_fit_is_refused_in_one_line(
    slurm: Submitting,
    around: Path,
    home: Path,
    keys: dict[str, Any],
    words: tuple[str, ...],
    part: str,
    dry: bool,
) -> None:
    cluster = cluster_file(around, **keys)
    flags = ("--dry-run",) if dry else ()
    done = proma("launch", "slurm", QUICKSTART, "--cluster", cluster, *flags, *words)
    assert part in refused(done, home)
    assert done.stderr.count("\n") == 1
    assert not slurm.submitted


def test_an_unreachable_host_is_named_and_nothing_is_submitted(around: Path, home: Path) -> None:
    port = unused_port()
    ssh = {**SSH, "host": "127.0.0.1", "port": port, "identity": str(make_key(around / "key"))}
    cluster = cluster_file(around, ssh=ssh)
    done = proma("launch", "slurm", QUICKSTART, "--cluster", cluster)
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert last.startswith(f"error: ada@127.0.0.1, port {port}, can't be reached: ")
    assert not home.exists()


def test_a_dry_run_shows_scripts_plan_and_what_is_asked_for(around: Path, home: Path) -> None:
    cluster = cluster_file(around, partition="gpu")
    words = ("--dry-run", "--export", "trainer.save_every=5")
    done = proma("launch", "slurm", QUICKSTART, "--cluster", cluster, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("#!/bin/bash") == 2
    assert "==> train, on each node: scripts/train.sh" in done.stdout
    assert (
        "==> export: sbatch --requeue --parsable --dependency=afterok:<id of train>" in done.stdout
    )
    assert done.stdout.count("==> quickstart: proma plan") == 1
    assert "Fits: " in done.stdout
    assert done.stdout.splitlines()[-3:] == [
        "train: 1 node x 2 GPUs for 01:00:00, up to 2 GPU hours an attempt; account lab, "
        "partition gpu",
        "export: 1 node x 2 GPUs for 01:00:00, up to 2 GPU hours an attempt; account lab, "
        "partition gpu, after train",
        "Nothing was submitted.",
    ]
    assert not home.exists()


def test_a_warning_tells_of_code_that_is_not_shipped(
    around: Path, home: Path, repository: Path
) -> None:
    (repository / "new.py").touch()
    cluster = cluster_file(around)
    words = ("launch", "slurm", QUICKSTART, "--cluster", cluster, "--dry-run")
    done = proma(*words, "trainer.save_every=5")
    assert done.returncode == 0
    assert done.stderr == (
        "warning: jobs get the last commit, without changes to new.py; commit them, or set code: "
        "working_tree in the cluster file\n"
    )
    git(repository, "add", "new.py")
    git(repository, "commit", "-q", "-m", "Go on")
    assert proma(*words, "trainer.save_every=5").stderr == ""
    assert proma(*words, "trainer.save_every=0").stderr == (
        "warning: trainer.save_every is 0, so an attempt that is killed loses all its steps; a "
        "number of steps saves that often\n"
    )


def test_a_sweep_is_a_job_for_each_combination(slurm: Submitting, around: Path, home: Path) -> None:
    cluster = cluster_file(around)
    words = ("--detach", "--sweep", "seed=1,2", "--export")
    done = proma("launch", "slurm", QUICKSTART, "--cluster", cluster, *words)
    assert done.returncode == 0, done.stderr
    submitted = {call.rpartition("/")[2]: 101 + k for k, call in enumerate(slurm.submitted)}
    assert len(submitted) == 4
    for seed in (1, 2):
        train = submitted[f"train-quickstart-seed{seed}_sbatch.sh"]
        export = submitted[f"export-quickstart-seed{seed}_sbatch.sh"]
        assert "dependency" not in slurm.submitted[train - 101]
        assert f"dependency=afterok:{train} " in slurm.submitted[export - 101]
    (folder,) = (home / "experiments" / "quickstart").iterdir()
    config = (folder / "train-quickstart-seed2" / "code" / "proma_job.yaml").read_text()
    assert "name: quickstart-seed2" in config
    assert "seed: 2" in config


def test_what_was_submitted_is_looked_after(
    slurm: Submitting, around: Path, home: Path, programs: Programs
) -> None:
    cluster = cluster_file(around)
    done = proma("launch", "slurm", QUICKSTART, "--cluster", cluster, "--detach", "--export")
    assert done.returncode == 0, done.stderr
    (folder,) = (home / "experiments" / "quickstart").iterdir()
    assert (
        f"submitted {folder.name}; `proma launch status|logs|cancel {folder.name}`" in done.stderr
    )

    done = proma("launch", "status")
    assert done.returncode == 0
    assert folder.name in done.stdout
    for words in (("train", "101"), ("export", "102")):
        assert any(
            all(word in line for word in (*words, "RUNNING, attempt 2"))
            for line in done.stdout.splitlines()
        )

    (folder / "train" / "log-quickstart.train_101_0.out").write_text("first\n")
    (folder / "train" / "log-quickstart.train_101_1.out").write_text("second\n")
    done = proma("launch", "logs", folder.name, "--job", "train")
    assert [line for line in done.stdout.splitlines() if line[:3] != "==>"] == ["first", "second"]

    done = proma("launch", "cancel", folder.name)
    assert done.returncode == 0
    assert slurm.cancelled == ["101 102"]

    programs.add("scontrol", 'echo "JobState=FAILED ExitCode=1:0"')
    assert proma("launch", "status").returncode == 1
    programs.add("scontrol", 'echo "JobState=COMPLETED ExitCode=0:0"')
    assert proma("launch", "status").returncode == 0
    done = proma("launch", "logs", "--job", "eval")
    assert (done.returncode, done.stderr) == (
        2,
        "error: --job is eval, expected one of train, export\n",
    )


@pytest.mark.parametrize(("end", "code"), [("COMPLETED", 0), ("FAILED", 1), ("CANCELLED", 1)])
def test_the_exit_code_is_that_of_the_jobs(
    slurm: Submitting,
    around: Path,
    programs: Programs,
    monkeypatch: pytest.MonkeyPatch,
    end: str,
    code: int,
) -> None:
    """NeMo-Run's own would be 0 whatever becomes of them."""
    programs.add(
        "scontrol",
        f'if [ -e "$0.asked" ]; then echo "JobState={end} ExitCode=0:0"; exit; fi\n'
        'echo JobState=RUNNING; echo > "$0.asked"',
    )
    monkeypatch.setattr("proma_megatron.launching.logs.time", SimpleNamespace(sleep=lambda _: None))
    done = proma("launch", "slurm", QUICKSTART, "--cluster", cluster_file(around))
    assert done.returncode == code
    assert f"train, job 101: {end}" in done.stderr


@pytest.mark.parametrize("command", ["status", "logs", "cancel"])
def test_an_experiment_that_is_not_there_is_named(around: Path, home: Path, command: str) -> None:
    done = proma("launch", command, "nothing_1")
    sentence = refused(done, home)
    assert sentence == (
        f"'nothing_1' is no experiment in {home}/experiments; the newest are: none yet"
    )


def test_without_nemo_run_the_command_says_how_to_get_it(
    around: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proma_megatron.launching.cli.find_spec", lambda _: None)
    for words in (
        ("slurm", QUICKSTART, "--cluster", CLUSTERS[0]),
        ("local", QUICKSTART),
        ("status",),
    ):
        assert refused(proma("launch", *words), home) == (
            "nemo-run is not installed, which proma launch works through; install "
            "proma-megatron[launch], or in a checkout run `uv sync --extra launch`"
        )


def test_local_says_what_became_of_each_stage(
    around: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []

    def run_here(title: str, stages: Any) -> dict[str, str]:
        ran.append((title, [stage.name for stage in stages]))
        return dict.fromkeys((stage.name for stage in stages), "SUCCEEDED")

    monkeypatch.setattr("proma_megatron.launching.local.run_here", run_here)
    done = proma("launch", "local", QUICKSTART, "--export")
    assert (done.returncode, done.stderr) == (0, "train: SUCCEEDED\nexport: SUCCEEDED\n")
    assert ran == [("quickstart", ["train", "export"])]
    monkeypatch.setattr("proma_megatron.launching.local.run_here", lambda *_: {"train": "FAILED"})
    done = proma("launch", "local", QUICKSTART)
    assert (done.returncode, done.stderr) == (1, "train: FAILED\n")


def test_names_of_the_package_are_those_of_its_modules() -> None:
    from proma_megatron import launching as launch

    for name in launch.__all__:
        assert getattr(launch, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        launch.__getattr__("nothing")
