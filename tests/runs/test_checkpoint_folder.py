"""The folder of checkpoints: which is the newest, which is the best, and which may go."""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from support.runs import complete

from proma_megatron.checkpoints.compatibility import why_no_scaling
from proma_megatron.errors import ConfigError, StorageError
from proma_megatron.runs.checkpoint_folder import (
    MARKER,
    Marker,
    best,
    expendable,
    newest,
    point,
    read_marker,
    remove,
)


def steps(folder: Path, *numbers: int, scores: dict[int, float] | None = None) -> None:
    for number in numbers:
        complete(folder / f"step_{number:06d}", (scores or {}).get(number))


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_rl_comes_after_the_warm_start_and_numbers_count_as_numbers(tmp_path: Path) -> None:
    complete(tmp_path / "warm_start_000900")
    assert newest(tmp_path) == tmp_path / "warm_start_000900"
    steps(tmp_path, 0, 999_999, 1_000_000)
    assert newest(tmp_path) == tmp_path / "step_1000000"


def test_what_is_incomplete_or_not_ours_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "step_000007").mkdir()
    (tmp_path / "step_old").mkdir()
    (tmp_path / "step_000009").write_text("a file")
    assert newest(tmp_path) is None
    steps(tmp_path, 3)
    point(tmp_path, "latest", tmp_path / "step_000003")
    (tmp_path / "step_000008").symlink_to("step_000003")  # a link counts once
    assert newest(tmp_path) == tmp_path / "step_000003"


def test_the_best_is_the_earliest_of_equals(tmp_path: Path) -> None:
    steps(tmp_path, 0, 10, 20, 30, scores={10: 0.5, 20: 0.75, 30: 0.75})
    assert best(tmp_path) == tmp_path / "step_000020"


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "gone"),
    [
        (None, 0, []),
        (None, 1, []),
        (1, 0, [10, 20, 30]),
        (2, 0, [10, 20]),
        (1, 1, [20, 30]),
        (1, 2, [30]),
        (9, 0, []),
    ],
)
def test_what_may_go(
    tmp_path: Path, keep_last: int | None, keep_best: int, gone: list[int]
) -> None:
    # Step 0 always stays: divergences are measured to it.
    steps(tmp_path, 0, 10, 20, 30, 40, scores={10: 0.9, 20: 0.6, 40: 0.3})
    if keep_best == 2:
        steps(tmp_path, 20, scores={20: 0.7})
    assert names(expendable(tmp_path, keep_last, keep_best)) == [f"step_{n:06d}" for n in gone]


def test_the_warm_start_goes_when_rl_has_begun(tmp_path: Path) -> None:
    for number in (10, 20):
        complete(tmp_path / f"warm_start_{number:06d}")
    assert expendable(tmp_path, None, 0) == []
    assert names(expendable(tmp_path, 1, 0)) == ["warm_start_000010"]
    steps(tmp_path, 0)
    assert names(expendable(tmp_path, None, 0)) == ["warm_start_000010", "warm_start_000020"]


def test_a_removed_checkpoint_is_never_half_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps(tmp_path, 1)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # the crash comes here
    remove(tmp_path / "step_000001")
    assert newest(tmp_path) is None


def test_a_link_moves_at_once_or_not_at_all(tmp_path: Path) -> None:
    steps(tmp_path, 1, 2)
    point(tmp_path, "latest", tmp_path / "step_000001")
    (tmp_path / ".latest.part").symlink_to("step_000009")  # of a crash between the two
    assert (tmp_path / "latest").resolve() == tmp_path / "step_000001"
    point(tmp_path, "latest", tmp_path / "step_000002")
    assert (tmp_path / "latest").resolve() == tmp_path / "step_000002"
    assert not (tmp_path / ".latest.part").is_symlink()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"files": {"a": 3}})])
def test_a_marker_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    path = complete(tmp_path / "step_000004")
    (path / MARKER).write_text(text)
    with pytest.raises(StorageError, match=r"step_000004/complete\.json can't be read"):
        read_marker(path)


def test_one_damaged_marker_does_not_hide_the_best_of_the_others(tmp_path: Path) -> None:
    steps(tmp_path, 1, 2, scores={1: 0.9, 2: 0.5})
    (tmp_path / "step_000001" / MARKER).write_text("{}")
    assert best(tmp_path) == tmp_path / "step_000002"
    assert expendable(tmp_path, 1, 1) == [tmp_path / "step_000001"]


def test_a_listing_that_fails_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert newest(tmp_path / "never_made") is None
    (tmp_path / "scratch").symlink_to(tmp_path / "not_mounted")
    with pytest.raises(StorageError, match="scratch can't be listed"):
        newest(tmp_path / "scratch")
    monkeypatch.setattr("os.scandir", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(StorageError, match=r"can't be listed \(Permission denied\)"):
        newest(tmp_path)


def test_an_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no complete checkpoint: it has no complete\.json"):
        read_marker(tmp_path)


def test_what_delayed_scaling_remembers_is_of_use_in_its_own_layout_only() -> None:
    layout = {"tensor": 2, "pipeline": 1, "data": 1}
    without = Marker("rl", 1, state={}, model={}, layout=layout)
    marker = replace(without, holds=("scaling",))
    assert why_no_scaling(marker, dict(layout)) == ""
    assert why_no_scaling(marker, layout | {"tensor": 1}) == "has its memory for another layout"
    assert why_no_scaling(without, layout) == "has none of its memory"
