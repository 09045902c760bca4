"""The order of the rooms: each imports itself and rooms before it, and no two files each other."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "proma_megatron"
ORDER = (
    *("errors", "types", "files", "config", "batching", "advantages", "losses", "data"),
    *("distributed", "processes", "runs", "weights", "model", "observability", "rewards"),
    *("projection", "rollout", "figures", "learner", "planning", "evaluation", "checkpoints"),
    *("training", "launching", "commands", "cli"),
)
LOOSE = {"__init__", "errors", "types", "files", "cli"}


@cache
def sources() -> dict[str, Path]:
    """Return every file of the package by its dotted name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imported(name: str) -> frozenset[str]:
    """Return the package's files that one names: also later, for types, and as text."""
    return frozenset(found for found in _named(sources()[name]) if found != name)


def _named(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = re.findall(rf"^{PACKAGE}(?:\.\w+)+$", node.value)
        for name in names:
            yield from _file_of(name)


def _file_of(name: str) -> Iterator[str]:
    """Yield the file that holds this name: it, or what it is in."""
    if name in sources():
        yield name
    elif "." in name and name.rpartition(".")[0] in sources():
        yield name.rpartition(".")[0]


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def test_every_room_has_its_place_in_the_order() -> None:
    assert {room(name) for name in sources()} - {"__init__"} == set(ORDER)
    assert {path.stem for path in (ROOT / PACKAGE).glob("*.py")} == LOOSE


@pytest.mark.parametrize("place", ORDER)
def test_a_room_imports_only_rooms_before_it(place: str) -> None:
    below = {*ORDER[: ORDER.index(place) + 1], "__init__"}
    upward = {
        f"{name} -> {other}"
        for name in sources()
        if room(name) == place
        for other in imported(name)
        if room(other) not in below
    }
    assert not upward


def test_no_two_files_import_each_other() -> None:
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for other in sorted(imported(name)):
                visit(other, (*way, name))
            done.add(name)

    for name in sources():
        visit(name, ())


def test_only_topology_asks_megatron_for_its_groups() -> None:
    naming = [name for name, path in sources().items() if "parallel_state" in path.read_text()]
    assert naming == [f"{PACKAGE}.distributed.topology"]


def test_nothing_imports_the_name_launch() -> None:
    for folder in (PACKAGE, "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"^\s*(import|from) launch\b", path.read_text(), re.MULTILINE), (
                path
            )


def test_benchmarks_import_nothing_of_the_tests() -> None:
    for path in (ROOT / "benchmarks").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) (support|tests)\b", path.read_text(), re.M), path


# What refuses a configuration, scores, plans or launches starts without these, which take seconds.
HEAVY = ("torch", "megatron", "nemo_run", "transformers", "hydra", "fiddle")
LIGHT = (
    *("cli", "config.run", "config.loading", "rewards.pool", "runs.directory", "runs.policies"),
    *("observability.metrics", "figures.files", "planning.plan"),
    *("launching", "launching.cli", "launching.stages"),
)


def test_what_has_to_start_fast_loads_no_heavy_library() -> None:
    program = (
        "import importlib, sys\n"
        f"for name in {LIGHT}:\n"
        f"    importlib.import_module('{PACKAGE}.' + name)\n"
        f"    heavy = [each for each in {HEAVY} if each in sys.modules]\n"
        "    assert not heavy, (name, heavy)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
