"""The list of planted faults fits the tree: `plant.py` could plant each of them today."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from plant import ROOT, Fault, planted, read_faults, with_fault

FAULTS = read_faults()
NAMED = pytest.mark.parametrize("fault", FAULTS, ids=[fault.id for fault in FAULTS])


@NAMED
def test_its_text_is_there_once_and_changes(fault: Fault) -> None:
    content = (ROOT / fault.file).read_text()
    assert with_fault(fault, content) != content


@NAMED
def test_its_tests_are_there(fault: Fault) -> None:
    assert fault.red
    for selected in fault.red:
        file, _, test = selected.partition("::")
        content = (ROOT / file).read_text()
        assert not test or f"def {test.partition('[')[0]}(" in content


def test_their_names_differ() -> None:
    assert len({fault.id for fault in FAULTS}) == len(FAULTS) >= 20


def test_text_that_is_gone_or_comes_twice_is_told() -> None:
    fault = FAULTS[0]
    for count in (0, 2):
        with pytest.raises(ValueError, match=f"{fault.id} is {count} times in {fault.file}"):
            with_fault(fault, fault.text * count)


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    """A file with the first fault's text in it, in a repository of its own."""
    path = tmp_path / "file.py"
    path.write_text(f"# before\n{FAULTS[0].text}\n")
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "Add a file"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    return path


def test_a_file_is_as_it_was_whatever_happens(committed: Path) -> None:
    content, times = committed.read_bytes(), committed.stat()

    def interrupted() -> None:
        with planted(FAULTS[0], committed):
            assert committed.read_text() == f"# before\n{FAULTS[0].replacement}\n"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert committed.read_bytes() == content
    assert committed.stat().st_mtime_ns == times.st_mtime_ns


def test_changes_that_are_not_committed_are_not_touched(committed: Path) -> None:
    content = committed.read_text() + "# after\n"
    committed.write_text(content)
    with pytest.raises(ValueError, match="commit or drop them"), planted(FAULTS[0], committed):
        pass
    assert committed.read_text() == content
