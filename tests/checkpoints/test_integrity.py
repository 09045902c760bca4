"""A checkpoint that is no longer what was written, or that would run something, is not read."""

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import read_alone, write_alone
from support.pool import WorkerPool
from support.runs import complete

from proma_megatron.checkpoints.integrity import (
    INDEX,
    check_contents,
    check_index,
    check_sizes,
    plain_values_only,
)
from proma_megatron.errors import StorageError
from proma_megatron.files import size_and_checksum
from proma_megatron.runs.checkpoint_folder import Marker, read_marker


class Runs:
    """What a pickle can do to its reader."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Marker]:
    """A checkpoint of two files with the right sums."""
    path = complete(tmp_path / "step_000005")
    files = {}
    for name, content in (("__0_0.distcp", b"weights" * 100), ("__1_0.distcp", b"more" * 100)):
        (path / name).write_bytes(content)
        files[name] = size_and_checksum(path / name)
    return path, replace(read_marker(path), files=files)


def test_what_is_whole_passes(saved: tuple[Path, Marker]) -> None:
    path, marker = saved
    check_sizes(path, marker)
    for part in range(3):
        check_contents(path, marker, part, 3)


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp"])
def test_a_truncated_or_missing_file_is_named(saved: tuple[Path, Marker], name: str) -> None:
    path, marker = saved
    os.truncate(path / name, 10)
    with pytest.raises(StorageError, match=rf"step_000005/{name} has 10 bytes, expected"):
        check_sizes(path, marker)
    (path / name).unlink()
    with pytest.raises(StorageError, match=rf"{name} is missing.*remove step_000005 to go on"):
        check_sizes(path, marker)


@pytest.mark.parametrize(("name", "reader"), [("__0_0.distcp", 0), ("__1_0.distcp", 1)])
def test_a_changed_byte_is_found_by_the_rank_that_looks_there(
    saved: tuple[Path, Marker], name: str, reader: int
) -> None:
    path, marker = saved
    content = bytearray((path / name).read_bytes())
    content[57] ^= 1
    (path / name).write_bytes(content)
    check_sizes(path, marker)
    check_contents(path, marker, 1 - reader, 2)
    with pytest.raises(StorageError, match=rf"{name} is damaged"):
        check_contents(path, marker, reader, 2)


def test_an_index_that_would_run_something_does_not(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(pickle.dumps({"weights": Runs(tmp_path / "ran")}))
    with pytest.raises(StorageError, match=r"\.metadata can't be read .*it names posix\.mkdir"):
        check_index(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x04."])
def test_an_index_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(StorageError, match=r"\.metadata can't be read"):
        check_index(tmp_path)


def test_other_objects_are_plain_values_whoever_loads_them(tmp_path: Path) -> None:
    torch.save({"schedule": Runs(tmp_path / "ran")}, tmp_path / "object.pt")
    with plain_values_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "object.pt", weights_only=False)
    assert not (tmp_path / "ran").exists()


def test_every_rank_refuses_before_anything_is_changed(workers: WorkerPool, tmp_path: Path) -> None:
    path = tmp_path / "step_000002"
    workers.run(2, write_alone, path=path)
    shard = next(iter(sorted(path.glob("__1_*"))))  # read by one rank
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 8
    shard.write_bytes(content)
    for complaint, untouched in workers.run(2, read_alone, path=path):
        assert f"{shard.name} is damaged" in complaint
        assert untouched


def test_a_checkpoint_of_another_model_is_refused(workers: WorkerPool, tmp_path: Path) -> None:
    path = tmp_path / "step_000002"
    workers.run(1, write_alone, path=path)
    ((complaint, untouched),) = workers.run(1, read_alone, path=path, layers=2)
    assert "step_000002 is a checkpoint of another model: its model.layers is 4" in complaint
    assert untouched
