import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from nemo_run.config import get_nemorun_home, set_nemorun_home
from support.launch import Programs, git

from proma_megatron.launching import shipping


@pytest.fixture(autouse=True)
def _no_input(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """NeMo-Run hands standard input on to git and sbatch; pytest's can't be read."""
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        yield


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """NeMo-Run's records of this test; nothing makes the folder before something is written."""
    before = get_nemorun_home()
    folder = tmp_path / "home_of_nemo"
    set_nemorun_home(str(folder))
    yield folder
    set_nemorun_home(before)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small git repository in place of the project's checkout, whose state is its developer's."""
    folder = tmp_path / "checkout"
    for name in (
        "launch/__init__.py",
        "proma_megatron/cli.py",
        "data/problems.jsonl",
    ):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("committed\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "Begin")
    for module in ("shipping", "executors", "experiments"):
        monkeypatch.setattr(f"proma_megatron.launching.{module}.checkout", lambda: folder)
    shipping._tracked.cache_clear()
    yield folder
    shipping._tracked.cache_clear()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files and folders of this process are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return Programs(tmp_path / "programs")
