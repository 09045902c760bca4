"""The run directory: who may write there, and what overwriting removes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.runs import complete

from proma_megatron.errors import ConfigError
from proma_megatron.runs.checkpoint_folder import MARKER
from proma_megatron.runs.directory import RunDir, prepare_run_dir, resumes
from proma_megatron.runs.environment import describe_environment, git_state


def _start_run(path: Path) -> RunDir:
    """A directory with every file of a run, each with something in it."""
    run_dir = prepare_run_dir(path, resume=False, overwrite=False)
    files = (run_dir.config, run_dir.environment, run_dir.metrics, run_dir.samples)
    for file in (*files, run_dir.tokenizer, run_dir.unscored(3)):
        file.write_text("old\n")
    for folder in run_dir.folders:
        (folder / "old").write_text("old")
    complete(run_dir.checkpoint(2))
    return run_dir


def _one_sentence(error: pytest.ExceptionInfo[ConfigError]) -> bool:
    text = str(error.value)
    return "\n" not in text and ". " not in text and not text.endswith(".")


def test_a_job_that_is_queued_again_resumes_only_from_a_complete_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert not resumes(path)
    run_dir = _start_run(path)
    assert resumes(path)
    (run_dir.checkpoint(2) / MARKER).unlink()
    assert not resumes(path)
    prepare_run_dir(path, resume=False, overwrite=True)  # what is left is no obstacle
    (run_dir.checkpoints / "step_000003").mkdir()
    complete(run_dir.checkpoint(3))
    assert not resumes(path)  # of no run


def test_new_run_gets_its_folders(tmp_path: Path) -> None:
    run_dir = prepare_run_dir(tmp_path / "runs" / "new", resume=False, overwrite=False)
    assert sorted(p.name for p in run_dir.path.iterdir()) == [
        "checkpoints",
        "evaluation",
        "logs",
        "nonfinite",
        "tensorboard",
    ]


def test_new_run_keeps_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine")
    prepare_run_dir(tmp_path, resume=False, overwrite=False)
    assert (tmp_path / "notes.md").read_text() == "mine"


@pytest.mark.parametrize("marker", ["config.yaml", "metrics.jsonl"])
def test_existing_run_is_refused_untouched(tmp_path: Path, marker: str) -> None:
    (tmp_path / marker).write_text("old")
    with pytest.raises(ConfigError, match="already holds a run") as error:
        prepare_run_dir(tmp_path, resume=False, overwrite=False)
    assert _one_sentence(error)
    assert [p.name for p in tmp_path.iterdir()] == [marker]


def test_overwrite_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    run_dir = _start_run(tmp_path / "run")
    (run_dir.path / "notes.md").write_text("mine")
    (run_dir.path / "plots").mkdir()
    (run_dir.path / "plots" / "a.png").write_text("mine")

    prepare_run_dir(run_dir.path, resume=False, overwrite=True)

    left = sorted(str(p.relative_to(run_dir.path)) for p in run_dir.path.rglob("*"))
    assert left == [
        "checkpoints",
        "evaluation",
        "logs",
        "nonfinite",
        "notes.md",
        "plots",
        "plots/a.png",
        "tensorboard",
    ]


def test_overwrite_without_a_run_removes_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "theirs").write_text("theirs")
    prepare_run_dir(tmp_path, resume=False, overwrite=True)
    assert (tmp_path / "logs" / "theirs").exists()


def test_overwrite_does_not_follow_links(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "weights").write_text("theirs")
    run_dir = _start_run(tmp_path / "run")
    shutil.rmtree(run_dir.checkpoints)
    run_dir.checkpoints.symlink_to(elsewhere)

    prepare_run_dir(run_dir.path, resume=False, overwrite=True)

    assert (elsewhere / "weights").exists()
    assert run_dir.checkpoints.is_dir()
    assert not run_dir.checkpoints.is_symlink()


def test_interrupted_overwrite_still_reads_as_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = _start_run(tmp_path / "run")
    remove = Path.unlink

    def fail_at_metrics(path: Path, missing_ok: bool = False) -> None:
        if path == run_dir.metrics:
            raise PermissionError(13, "Permission denied")
        remove(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", fail_at_metrics)
    with pytest.raises(ConfigError, match="Permission denied"):
        prepare_run_dir(run_dir.path, resume=False, overwrite=True)
    assert not run_dir.samples.exists()
    assert run_dir.config.exists()


def test_resume_keeps_everything(tmp_path: Path) -> None:
    run_dir = _start_run(tmp_path / "run")
    before = {p: p.read_text() for p in run_dir.path.rglob("*") if p.is_file()}
    prepare_run_dir(run_dir.path, resume=True, overwrite=False)
    assert {p: p.read_text() for p in run_dir.path.rglob("*") if p.is_file()} == before


def test_resume_needs_a_complete_checkpoint(tmp_path: Path) -> None:
    run_dir = _start_run(tmp_path / "run")
    (run_dir.checkpoint(2) / MARKER).unlink()
    with pytest.raises(ConfigError, match="no complete checkpoint") as error:
        prepare_run_dir(run_dir.path, resume=True, overwrite=False)
    assert _one_sentence(error)


@pytest.mark.parametrize("exists", [False, True])
def test_resume_needs_a_run(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "run"
    if exists:
        path.mkdir()
    with pytest.raises(ConfigError, match="no run to resume") as error:
        prepare_run_dir(path, resume=True, overwrite=False)
    assert _one_sentence(error)
    assert path.exists() == exists


def test_resume_with_overwrite_is_refused(tmp_path: Path) -> None:
    run_dir = _start_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="both"):
        prepare_run_dir(run_dir.path, resume=True, overwrite=True)
    assert run_dir.metrics.read_text() == "old\n"


@pytest.mark.parametrize("below", ["", "run"])
def test_file_in_the_way_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("theirs")
    with pytest.raises(ConfigError) as error:
        prepare_run_dir(tmp_path / "file" / below, resume=False, overwrite=False)
    assert _one_sentence(error)
    assert (tmp_path / "file").read_text() == "theirs"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a place where root can't write")
def test_unwritable_directory_is_refused() -> None:
    with pytest.raises(ConfigError, match="can't be written") as error:
        prepare_run_dir(Path("/proc"), resume=False, overwrite=False)
    assert _one_sentence(error)


def test_resume_on_a_read_only_mount_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All folders are there, so only an attempt to write can tell."""
    run_dir = _start_run(tmp_path / "run")

    def refuse(dir: Path) -> None:  # noqa: A002  (tempfile's own name)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ConfigError, match="Read-only file system"):
        prepare_run_dir(run_dir.path, resume=True, overwrite=False)


def test_environment_has_versions_and_device_but_no_host(tmp_path: Path) -> None:
    run_dir = prepare_run_dir(tmp_path / "run", resume=False, overwrite=False)
    run_dir.write_environment("cpu")
    text = run_dir.environment.read_text()
    environment = json.loads(text)
    assert set(environment) == {"versions", "git", "device"}
    assert environment["device"] == "cpu"
    versions = environment["versions"]
    packages = {"python", "torch", "megatron-core", "proma-megatron", "numpy", "sentencepiece"}
    assert set(versions) == packages
    assert all(versions.values()), versions
    assert os.uname().nodename not in text
    assert environment == describe_environment("cpu")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    root.mkdir()
    _git(root, "init", "-q")
    (root / "code.py").write_text("a = 1\n")
    _git(root, "add", "code.py")
    return root


def _git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(root), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_git_state_follows_the_checkout(checkout: Path) -> None:
    assert git_state(checkout) == {"revision": None, "dirty": True}
    _git(checkout, "commit", "-qm", "first")
    revision = _git(checkout, "rev-parse", "HEAD")
    assert git_state(checkout) == {"revision": revision, "dirty": False}
    (checkout / "code.py").write_text("a = 2\n")
    assert git_state(checkout) == {"revision": revision, "dirty": True}


def test_package_installed_inside_another_checkout_has_no_git_state(
    checkout: Path, tmp_path: Path
) -> None:
    site_packages = checkout / ".venv" / "site-packages"
    site_packages.mkdir(parents=True)
    assert git_state(site_packages) is None
    assert git_state(tmp_path) is None


def test_no_git_program_is_no_git_state(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_state(checkout) is None
