"""Which code loads which: `proma` must start fast, and training must not need NeMo-Run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.launch import ROOT


def imports(path: Path) -> Iterator[str]:
    """Modules that a source names, also those that it loads later."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_training_code_loads_launching() -> None:
    sources = sorted((ROOT / "proma_megatron").rglob("*.py"))
    assert len(sources) > 50
    loading = [
        path.name
        for path in sources
        if path.parent.name != "launching"
        and any(name.startswith("proma_megatron.launching") for name in imports(path))
    ]
    assert loading == ["cli.py"]


CONFIGURATION = ("proma_megatron.config.", "proma_megatron.errors")


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "proma_megatron" / "launching").rglob("*.py")),
    ids=lambda path: path.name,
)
def test_launching_loads_no_training_code(path: Path) -> None:
    planning = ("proma_megatron.planning.", "proma_megatron.data.")  # which load none either
    for name in imports(path):
        if name.startswith("proma_megatron.") and "launching" not in name:
            permitted = name.startswith(CONFIGURATION)
            assert permitted or (path.name == "cli.py" and name.startswith(planning)), name


def test_what_a_launch_reads_is_loaded_when_it_does() -> None:
    tree = ast.parse((ROOT / "proma_megatron" / "launching" / "cli.py").read_text())
    at_once = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name for name in at_once if str(name).startswith("proma_megatron")} == {
        "proma_megatron.errors"
    }
