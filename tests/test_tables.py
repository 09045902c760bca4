"""The README's tables are those of the tests that are there."""

from __future__ import annotations

import pytest
from support.cases import Case
from tables import README, coverage, tables, with_tables


def test_they_are_current() -> None:
    page = README.read_text()
    assert page == with_tables(page, tables()), "run python tests/tables.py"


def test_a_case_counts_for_each_axis_that_it_has() -> None:
    cases = [
        Case("exact-bound", "untied", tensor=2, sequence=True, data=2),
        Case("exact", "kv1", tensor=2, sequence=True),
        Case("kernel", pipeline=2, virtual=2),
    ]
    head, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in coverage(cases).splitlines()
    )
    found = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert found["exact"]["TP+SP"] == "untied, kv1: 2"
    assert found["exact"]["DP"] == "untied: 1"
    assert found["exact"]["TP"] == "-"
    assert found["kernel"]["VPP"] == found["kernel"]["tied ends"] == "qwen3: 1"
    assert found["norm"]["one process"] == "-"


def test_a_page_without_marks_is_told() -> None:
    with pytest.raises(ValueError, match="no marks of the table faults"):
        with_tables("", {"faults": ""})
