"""A rank starts without loading a compiler that it may never use."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from proma_megatron.processes.entry import defer_compilation


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions that were compiled since, in a process that defers."""
    names: list[str] = []

    def compile_at_once(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        names.append(function.__name__)
        return lambda *args, **kwargs: (function(*args, **kwargs), options)

    monkeypatch.setattr(torch, "compile", compile_at_once)
    defer_compilation()
    defer_compilation()  # as a library that is loaded twice would
    return names


def _of_megatron(x: int, *, plus: int = 0) -> int:
    """Adds."""
    return x + plus


_of_megatron.__module__ = "megatron.core.fusions"


def test_megatrons_functions_are_compiled_once_and_when_called(compiled: list[str]) -> None:
    fused: Any = torch.compile(_of_megatron, dynamic=True)
    assert not compiled
    assert fused.__doc__ == "Adds."
    assert [fused(1), fused(1, plus=2)] == [(1, {"dynamic": True}), (3, {"dynamic": True})]
    assert compiled == ["_of_megatron"]


def test_within_another_compilation_they_are_left_to_it(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused: Any = torch.compile(_of_megatron)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert fused(1, plus=2) == 3
    assert not compiled


def test_other_functions_are_compiled_at_once(compiled: list[str]) -> None:
    def own() -> None:
        pass

    def homeless() -> None:
        pass

    homeless.__module__ = None  # type: ignore[assignment]
    torch.compile(own)
    torch.compile(model=homeless)
    assert compiled == ["own", "homeless"]


@pytest.mark.ranks
def test_the_modules_of_a_run_load_no_compiler() -> None:
    """If Megatron loads one in another way than by torch.compile, starting takes seconds more."""
    program = (
        "import sys; from proma_megatron.processes import entry; entry.defer_compilation();"
        "import proma_megatron.commands.train.rank, proma_megatron.commands.gradients.rank;"
        "print('torch._inductor.compile_fx' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout.split() == ["False"], found.stderr
