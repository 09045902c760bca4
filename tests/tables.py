"""Write the tables of tests/README.md: the planted faults, and what the exactness tests cover.

``python tests/tables.py`` writes them between their marks; a test holds them current.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from plant import read_faults
from support.cases import MODELS, Case, projection_named

TESTS = Path(__file__).resolve().parent
README = TESTS / "README.md"
EXACTNESS = ("projection/test_exactness.py", "projection/test_other_rules.py")
RULES = ("exact", "iterative", "ridge", "kernel", "norm", "subspace")
AXES: dict[str, Callable[[Case], bool]] = {
    "TP": lambda case: case.tensor > 1 and not case.sequence,
    "TP+SP": lambda case: case.sequence,
    "PP": lambda case: case.pipeline > 1 and not case.virtual,
    "VPP": lambda case: case.virtual is not None,
    "tied ends": lambda case: case.pipeline > 1 and MODELS[case.model].tie_embeddings,
    "DP": lambda case: case.data > 1,
    "recompute": lambda case: case.recompute,
    "streamed": lambda case: case.block_bytes is not None,
    "float32": lambda case: case.dtype == "float32",
}
AXES = {"one process": lambda case: case.world_size == 1} | AXES


def exactness_cases() -> Iterator[tuple[Case, bool]]:
    """Yield each case of the exactness tests, and whether it is slow, as pytest collects them.

    Both are read from the marks of the test functions, from which pytest makes its parameters.
    """
    for file in EXACTNESS:
        spec = importlib.util.spec_from_file_location(Path(file).stem, TESTS / file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, found in vars(module).items():
            if name.startswith("test_"):
                yield from _cases(getattr(found, "pytestmark", ()))


def _cases(marks: Iterable) -> Iterator[tuple[Case, bool]]:
    slow = any(mark.name == "slow" for mark in marks)
    for mark in marks:
        if mark.name != "parametrize" or mark.args[0] != "case":
            continue
        for value in mark.args[1]:
            if isinstance(value, Case):
                yield value, slow
            else:  # what pytest.param made
                (case,) = value.values
                yield case, slow or any(mark.name == "slow" for mark in value.marks)


def coverage(cases: Iterable[Case]) -> str:
    """Return a table with a row a rule: of each axis the models, and how many cases have it."""
    cases = list(cases)
    rows = [["rule", *AXES], ["---"] * (1 + len(AXES))]
    for rule in RULES:
        mine = [case for case in cases if projection_named(case.projection).rule == rule]
        rows.append([rule, *(_cell([case for case in mine if has(case)]) for has in AXES.values())])
    return _table(rows)


def _cell(cases: list[Case]) -> str:
    models = {case.model for case in cases}
    names = "all" if models == set(MODELS) else ", ".join(m for m in MODELS if m in models)
    return f"{names}: {len(cases)}" if cases else "-"


def faults() -> str:
    """Return a table with a row a planted fault."""
    rows = [["fault", "what it breaks", "red in"], ["---"] * 3]
    for fault in read_faults():
        tests = dict.fromkeys(selected.partition("[")[0] for selected in fault.red)
        rows.append([f"`{fault.id}`", fault.breaks, ", ".join(f"`{t[6:]}`" for t in tests)])
    return _table(rows)


def _table(rows: Iterable[Iterable[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def tables() -> dict[str, str]:
    """Return the tables by the names of their marks."""
    found = list(exactness_cases())
    return {
        "faults": faults(),
        "default": coverage(case for case, slow in found if not slow),
        "slow": coverage(case for case, slow in found if slow),
    }


def with_tables(page: str, made: Mapping[str, str]) -> str:
    """Return the page with the tables between their marks.

    Raises:
        ValueError: a mark is missing.
    """
    for name, table in made.items():
        begin, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{README.name} has no marks of the table {name}, expected {begin}")
        page = f"{before}{begin}{table}{end}{after}"
    return page


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(), tables()))
