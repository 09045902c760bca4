"""What travels with a job: code at a commit, and a configuration that reads the same there."""

import tarfile
from pathlib import Path
from typing import Any

import pytest
from support.launch import CONTAINER, SSH, files_of, git, site

from proma_megatron.config.loading import load_config, validate_config
from proma_megatron.config.run import RunConfig
from proma_megatron.errors import ConfigError
from proma_megatron.launching.executors import slurm_executor
from proma_megatron.launching.nodes import Nodes
from proma_megatron.launching.shipping import (
    arguments_of,
    checkout,
    file_for,
    for_cluster,
    left_behind,
    revision,
    write_config,
)
from proma_megatron.launching.stages import stages_of


def config(**tree: Any) -> RunConfig:
    return validate_config({"name": "run", **tree})


def refusal(found: RunConfig, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        for_cluster(found, site(**keys))
    return str(caught.value)


# --------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("root", "keys", "there"),
    [
        ("runs", {"runs": "/scratch/runs"}, "/scratch/runs"),
        ("runs", {"runs": "/scratch/runs", "ssh": SSH}, "/scratch/runs"),
        ("runs", {"ssh": SSH}, "/jobs/runs"),
        ("a/b", {"ssh": SSH}, "/jobs/a/b"),
        ("/else", {"ssh": SSH}, "/else"),
        ("/else", {"runs": "/scratch/runs"}, "/else"),
        ("/lustre/x", {"container": CONTAINER, "runs": "/lustre/runs"}, "/lustre/x"),
        ("runs", {"container": CONTAINER, "runs": "/lustre/runs"}, "/lustre/runs"),
    ],
)
def test_runs_go_where_the_cluster_file_says(
    repository: Path, root: str, keys: dict[str, Any], there: str
) -> None:
    assert for_cluster(config(root=root), site(**keys)).run_dir == Path(there, "run")


def test_on_this_machine_runs_stay_where_they_would_be(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert for_cluster(config(), site()).root == tmp_path / "runs"


def test_a_root_that_would_be_lost_with_the_container_is_refused() -> None:
    assert refusal(config(root="/else"), container=CONTAINER, runs="/lustre/runs") == (
        "root is /else, which no mount of the container holds, so that the run would be lost with "
        "it; leave root out, for the cluster file has runs"
    )


@pytest.mark.parametrize(
    ("own", "minutes"), [({}, 55), ({"max_minutes": 7}, 7), ({"max_minutes": 100}, 100)]
)
def test_a_run_stops_by_itself_before_the_time_limit(
    repository: Path, own: dict[str, Any], minutes: float
) -> None:
    found = for_cluster(config(trainer=own), site(time="01:00:00", stop_minutes=5))
    assert found.trainer.max_minutes == minutes


def test_nothing_else_of_a_configuration_changes(repository: Path) -> None:
    before = config(seed=3, optimizer={"lr": 0.25}, rollout={"temperature": 0.5})
    after = for_cluster(before, site(runs="/runs"))
    restored = after.model_dump()
    restored["root"] = before.root
    restored["trainer"]["max_minutes"] = None
    assert RunConfig.model_validate(restored) == before


FILES = {"data": {"train_file": "data/problems.jsonl", "validation_file": "data/problems.jsonl"}}


@pytest.mark.parametrize("keys", [{}, {"ssh": SSH}, {"container": CONTAINER, "runs": "/lustre"}])
def test_files_of_the_code_stay_relative_to_it(repository: Path, keys: dict[str, Any]) -> None:
    data = for_cluster(config(**FILES), site(**keys)).data
    assert data.train_file == data.validation_file == Path("data/problems.jsonl")


def test_folders_of_the_code_are_shipped_too(repository: Path) -> None:
    assert file_for("tokenizer.path", Path("./data"), site(ssh=SSH)) == Path("data")


def test_files_here_become_absolute_where_jobs_see_this_machine(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").touch()
    assert file_for("--eval", Path("mine.jsonl"), site()) == tmp_path / "mine.jsonl"
    for keys in ({"ssh": SSH}, {"container": CONTAINER, "runs": "/lustre"}):
        with pytest.raises(ConfigError, match="which is relative and not in the code"):
            file_for("--eval", Path("mine.jsonl"), site(**keys))


@pytest.mark.parametrize(
    ("name", "path", "keys", "sentence"),
    [
        (
            "data.train_file",
            "gsm8k/train.jsonl",
            {"ssh": SSH},
            "data.train_file is gsm8k/train.jsonl, which is relative and not in the code that is "
            "shipped; give the path as the job sees it, for example "
            "data.train_file=/shared/train.jsonl",
        ),
        (
            "--eval",
            "data/problems.jsonl",
            {"code": "image", "ssh": SSH},
            "--eval is data/problems.jsonl, which is relative and not in the code that is shipped; "
            "give the path as the job sees it, for example --eval /shared/problems.jsonl",
        ),
        (
            "model.path",
            "/models/Qwen3-8B",
            {"container": CONTAINER, "runs": "/lustre"},
            "model.path is /models/Qwen3-8B, which no mount of the container holds; add it to "
            "container.mounts of the cluster file, or give the path within the container",
        ),
    ],
)
def test_a_file_that_a_job_would_not_find_is_refused(
    repository: Path, name: str, path: str, keys: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        file_for(name, Path(path), site(**keys))
    assert str(caught.value) == sentence


def test_keys_of_a_configuration_are_named_with_their_sections(repository: Path) -> None:
    files = {"data": {"train_file": "/lustre/x.jsonl", "validation_file": "y.jsonl"}}
    sentence = refusal(config(**files), ssh=SSH)
    assert sentence.startswith("data.validation_file is y.jsonl, which is relative")


def test_absolute_paths_are_as_the_job_sees_them(repository: Path) -> None:
    path = Path("/lustre/no/such/file")
    for keys in ({}, {"ssh": SSH}, {"container": CONTAINER, "runs": "/lustre"}):
        assert file_for("--eval", path, site(**keys)) == path


def test_a_shipped_configuration_reads_as_the_same_one(repository: Path, tmp_path: Path) -> None:
    odd = config(root="/my runs/$HOME", prompt={"system": 'a: "b"\n# c'}, **FILES)
    (stage,) = stages_of([for_cluster(odd, site())])
    path = write_config(stage, tmp_path)
    assert path is not None
    assert load_config(path) == stage.config


def test_only_a_training_needs_its_configuration(repository: Path, tmp_path: Path) -> None:
    train, evaluation, export = stages_of([config()], evaluate="/test", export="export")
    assert write_config(train, tmp_path) is not None
    assert write_config(evaluation, tmp_path) is write_config(export, tmp_path) is None
    assert arguments_of(train, Path("/there/x.yaml")) == (
        "train",
        "/there/x.yaml",
        "--resume-or-start",
    )
    assert arguments_of(export, None) == export.arguments


# --------------------------------------------------------------------------- code


def shipped(folder: Path, **keys: Any) -> dict[str, str]:
    """Files that a job finds in the folder that it starts in."""
    (stage,) = stages_of([config(root="/runs")])
    path = write_config(stage, folder / "written")
    executor = slurm_executor(site(**keys), Nodes(1, 2, 2), config=path)
    jobs, opened = folder / "jobs", folder / "opened"
    jobs.mkdir()
    archive = executor.packager.package(checkout(), str(jobs), "train")
    with tarfile.open(archive) as packed:
        packed.extractall(opened, filter="data")
    return {name: (opened / name).read_text() for name in files_of(opened)}


CODE = {"launch/__init__.py", "proma_megatron/cli.py", "data/problems.jsonl"}


def test_a_job_gets_the_code_of_the_last_commit_and_its_configuration_beside_it(
    repository: Path, tmp_path: Path
) -> None:
    (repository / "launch" / "__init__.py").write_text("changed\n")
    (repository / "new.py").write_text("untracked\n")
    found = shipped(tmp_path)
    assert set(found) == {*CODE, "proma_job.yaml"}
    assert found["launch/__init__.py"] == "committed\n"
    assert "name: run" in found["proma_job.yaml"]


def test_a_job_gets_the_files_as_they_are_if_the_cluster_file_says_so(
    repository: Path, tmp_path: Path
) -> None:
    (repository / "launch" / "__init__.py").write_text("changed\n")
    (repository / "added.py").write_text("added\n")
    git(repository, "add", "added.py")
    (repository / "new.py").write_text("untracked\n")
    status, head = git(repository, "status", "--porcelain"), git(repository, "rev-parse", "HEAD")
    found = shipped(tmp_path, code="working_tree")
    assert set(found) == {*CODE, "added.py", "proma_job.yaml"}
    assert found["launch/__init__.py"] == "changed\n"
    assert found["added.py"] == "added\n"
    assert git(repository, "status", "--porcelain") == status
    assert git(repository, "rev-parse", "HEAD") == head
    assert git(repository, "stash", "list") == ""


def test_an_unchanged_working_tree_is_the_last_commit(repository: Path) -> None:
    head = git(repository, "rev-parse", "HEAD")
    assert revision(site(code="working_tree")) == revision(site()) == head


def test_an_image_has_the_code_so_only_the_configuration_travels(
    repository: Path, tmp_path: Path
) -> None:
    assert set(shipped(tmp_path, code="image")) == {"proma_job.yaml"}


def test_a_commit_after_the_executor_was_made_changes_nothing(
    repository: Path, tmp_path: Path
) -> None:
    executor = slurm_executor(site(), Nodes(1, 2, 2))
    before = git(repository, "rev-parse", "HEAD")
    git(repository, "commit", "-q", "--allow-empty", "-m", "Go on")
    assert executor.packager.ref == before != git(repository, "rev-parse", "HEAD")


@pytest.mark.parametrize("code", ["committed", "working_tree"])
def test_code_that_git_does_not_hold_can_not_be_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr("proma_megatron.launching.shipping.checkout", lambda: tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(ConfigError) as caught:
        revision(site(code=code))
    assert str(caught.value) == (
        f"code is {code}, but {tmp_path} is no git checkout; install proma_megatron where jobs run "
        "and set code: image in the cluster file"
    )
    git(tmp_path, "init", "-q")
    with pytest.raises(ConfigError, match="has no commit yet; make one"):
        revision(site(code=code))
    assert revision(site(code="image")) is None


def test_a_package_within_another_checkout_is_not_shipped_with_it(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that was installed into an environment below a project of the user's."""
    monkeypatch.setattr("proma_megatron.launching.shipping.checkout", lambda: repository / "launch")
    with pytest.raises(ConfigError, match="is no git checkout"):
        revision(site())


def test_without_changes_there_is_no_warning(repository: Path) -> None:
    assert [left_behind(site(code=code)) for code in ("committed", "working_tree")] == [None, None]


def test_a_warning_names_what_jobs_will_not_see(repository: Path) -> None:
    (repository / "launch" / "__init__.py").write_text("changed\n")
    (repository / "new.py").touch()
    assert left_behind(site()) == (
        "jobs get the last commit, without changes to launch/__init__.py, new.py; commit them, or "
        "set code: working_tree in the cluster file"
    )
    assert left_behind(site(code="working_tree")) == (
        "jobs don't get new.py, which git does not track; git add what they need"
    )
    assert left_behind(site(code="image")) is None


def test_of_many_files_a_warning_names_three(repository: Path) -> None:
    for name in "abcde":
        (repository / name).touch()
    assert "without changes to a, b, c and 2 more; commit" in str(left_behind(site()))


def test_the_checkout_is_what_this_was_imported_from() -> None:
    assert (checkout() / "proma_megatron" / "launching" / "shipping.py").is_file()
    assert (checkout() / "proma_megatron" / "cli.py").is_file()
