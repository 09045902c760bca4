"""Saving beside training: what is saved is what was there then, or nothing, and never too much."""

from pathlib import Path

import pytest
from support.checkpoints import (
    save_and_fail,
    save_and_train_on,
    save_many,
    save_without_links,
)
from support.pool import WorkerPool

from proma_megatron.runs.checkpoint_folder import is_complete, newest


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_goes_on_and_the_checkpoint_holds_what_was_there(
    workers: WorkerPool, tmp_path: Path, ranks: int
) -> None:
    for before_marker, busy, intact in workers.run(ranks, save_and_train_on, folder=tmp_path):
        assert busy, "the save waited for its files"
        assert not before_marker, "it was complete before its files were written"
        assert intact
    assert newest(tmp_path) == tmp_path / "step_000002"


def test_what_is_no_longer_wanted_goes_once_the_next_is_complete(
    workers: WorkerPool, tmp_path: Path
) -> None:
    (seen,) = workers.run(1, save_many, folder=tmp_path, scores=[None, 0.25, 0.75, 0.5])
    # While one is written, all of the ones to keep are there.
    assert seen == [
        [],
        ["step_000000"],
        ["step_000000", "step_000001"],
        ["step_000000", "step_000002"],
        ["step_000000", "step_000002", "step_000003"],
    ]
    assert (tmp_path / "latest").resolve().name == "step_000003"
    assert (tmp_path / "best").resolve().name == "step_000002"


def test_a_complete_checkpoint_stays_whatever_becomes_of_its_links(
    workers: WorkerPool, tmp_path: Path
) -> None:
    (message,) = workers.run(1, save_without_links, folder=tmp_path)
    assert "its links and the removal of older ones failed: [Errno 95]" in message
    assert newest(tmp_path) == tmp_path / "step_000002"
    assert is_complete(tmp_path / "step_000001"), "it went before the links had moved"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_write_that_fails_on_one_rank_fails_on_all_and_leaves_nothing(
    workers: WorkerPool, tmp_path: Path, rank: int
) -> None:
    complaints = workers.run(2, save_and_fail, folder=tmp_path, failing=rank)
    for complaint in complaints:
        assert "checkpoint" in complaint
        assert "step_000002 can't be written ([Errno 28] No space left on device" in complaint
        assert "step_000001 is complete, --resume goes on from there" in complaint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000001"]
