"""Drills: all tests here have the mark `faults`, and share the runs that nothing happens to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import ledger
from support.drills import LAYOUTS, TINY, Drill

Reference = Callable[..., Drill]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session", autouse=True)
def table() -> Iterator[None]:
    """What was drilled goes to the file that PROMA_RELIABILITY names."""
    yield
    ledger.write()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Runs from beginning to end, by layout and what they change in `TINY`; each is made once."""
    made: dict[tuple[str, ...], Drill] = {}

    def run(layout: str, *overrides: str) -> Drill:
        key = (*TINY, *LAYOUTS.get(layout, ()), *overrides)
        if key not in made:
            made[key] = Drill(tmp_path_factory.mktemp("undisturbed"), key)
            made[key].finish()
        return made[key]

    return run
