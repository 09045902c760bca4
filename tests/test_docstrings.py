"""Docstrings of functions and methods begin with a verb: Return, Check, Write.

Properties, classes and modules are things, and have nouns. A verb that is missing in `VERBS` is
one word to add there.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "proma_megatron"
# Imperatives; one a word, in alphabetical order.
_WORDS = """
Accumulate Add Append Ask Attend Average Begin Broadcast Build Call Cancel Check Choose Commit
Compare Complete Compute Conclude Connect Continue Copy Count Create Cut Describe Differentiate
Divide Do Draw Drop Dump End Enter Estimate Evaluate Fill Find Finish Flush Follow Forget Form
Format Frame Free Gather Generate Give Go Group Hand Have Import Join Judge Keep Lay Learn Leave
Let Listen Load Log Look Make Measure Merge Move Name Narrow Note Open Pack Pad Parse Pass Plan
Prepare Print Prove Put Read Receive Record Reduce Remember Remove Repeat Replace Report Return
Roll Round Route Run Sample Save Say Score Send Serve Set Share Show Silence Solve Specify Spread
Stand Start Store Submit Subtract Sum Sweep Take Tell Train Try Update Validate Wait Warn Watch
Write Yield
"""
VERBS = frozenset(_WORDS.split())
PROPERTIES = ("property", "cached_property", "setter", "deleter")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def described(source: str) -> Iterator[tuple[Function, str]]:
    """Yield functions and methods of a file, nested ones too, with the docstrings they have."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function) and not _is_property(node):
            text = ast.get_docstring(node)
            if text is not None:
                yield node, text


def _is_property(node: Function) -> bool:
    """Tell whether a function is read as a value; its docstring says what that is."""
    names = (ast.unparse(found).partition("(")[0] for found in node.decorator_list)
    return any(name.rpartition(".")[2] in PROPERTIES for name in names)


def first_word(text: str) -> str:
    """Return what stands before the first space, without the comma or the full stop after it."""
    return (text.split() or [""])[0].rstrip(",.;:")


def faults(source: str) -> list[str]:
    """Return line, name and first word of each docstring that begins with no known verb."""
    return [
        f"{node.lineno}: {node.name} begins with {first_word(text)!r}"
        for node, text in described(source)
        if first_word(text) not in VERBS
    ]


@cache
def rooms() -> dict[str, list[Path]]:
    """Return the files of each room of the package, and those of ``launch/``."""
    found: dict[str, list[Path]] = {"launch": sorted((ROOT / "launch").rglob("*.py"))}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        place = path.relative_to(ROOT / PACKAGE)
        found.setdefault(place.parts[0], []).append(path)
    return found


@pytest.mark.parametrize("room", rooms())
def test_docstrings_of_functions_begin_with_a_verb(room: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{fault}"
        for path in rooms()[room]
        for fault in faults(path.read_text())
    ]
    assert not found, "\n".join(["write an imperative, or add the verb to VERBS:", *found])


def test_no_verb_is_a_word_that_describes() -> None:
    """Keep third persons, articles and the like out of the list, and words that nobody uses."""
    no_verbs = "A An As At Each Every For From How In Of On One That The This What Whether Why"
    assert VERBS.isdisjoint(no_verbs.split())
    assert sorted(VERBS) == _WORDS.split()
    assert not [verb for verb in VERBS if verb.endswith("s") and not verb.endswith("ss")]
    used = {
        first_word(text)
        for path in (ROOT / PACKAGE).rglob("*.py")
        for _, text in described(path.read_text())
    }
    assert sorted(VERBS - used) == []


@pytest.mark.parametrize(
    "docstring",
    [
        "The sequences of a batch.",
        "What a marker says.",
        "Whether it is there.",
        "Returns the sequences.",
        "Of a norm.",
        "``tree`` as a section.",
        "(T,) one value a token.",
        "Args:\n        x: a value.",
    ],
)
def test_a_docstring_without_a_verb_is_found(docstring: str) -> None:
    source = f'class A:\n    def f(self, x):\n        """{docstring}"""\n'
    assert [fault.partition(" begins")[0] for fault in faults(source)] == ["2: f"]


@pytest.mark.parametrize("decorator", ["property", "cached_property", "functools.cached_property"])
def test_a_property_has_a_noun(decorator: str) -> None:
    source = f'class A:\n    @{decorator}\n    def f(self):\n        """Bytes at the peak."""\n'
    assert faults(source) == []


def test_a_command_and_a_nested_function_are_looked_at() -> None:
    source = '@app.command()\ndef f():\n    """Help."""\n    def g():\n        """It."""\n'
    assert [fault.partition(" begins")[0] for fault in faults(source)] == ["2: f", "4: g"]
