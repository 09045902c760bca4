"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from proma_megatron.files import atomic_write, write_once, write_synced

REFUSED = "a half \ud800"  # by UTF-8


@pytest.fixture
def there(tmp_path: Path) -> Path:
    path = tmp_path / "marker.json"
    path.write_text("whole")
    return path


def holds(path: Path, text: str) -> bool:
    """Tell whether the file has this text, and nothing lies beside it."""
    return path.read_text() == text and list(path.parent.iterdir()) == [path]


def test_a_text_replaces_the_one_before_or_leaves_it(there: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_synced(there, REFUSED)
    assert holds(there, "whole")
    write_synced(there, "new")
    assert holds(there, "new")


def test_what_is_not_written_to_its_end_leaves_the_file_before(there: Path) -> None:
    with pytest.raises(UnicodeEncodeError), atomic_write(there) as part:
        part.write_text(REFUSED, encoding="utf-8")
    assert holds(there, "whole")
    with atomic_write(there) as part:
        part.write_text("new")
    assert holds(there, "new")


def test_a_link_stays_a_link(there: Path) -> None:
    link = there.with_name("link")
    link.symlink_to(there)
    with atomic_write(link) as part:
        part.write_text("new")
    assert link.is_symlink()
    assert there.read_text() == "new"


def test_the_first_of_several_writers_stays(there: Path) -> None:
    write_once(there, "late")
    assert holds(there, "whole")
