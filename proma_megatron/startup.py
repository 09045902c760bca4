"""Where a rank that we start begins, before anything loads Megatron-Core.

``python -m proma_megatron.startup MODULE ARGUMENTS`` runs ``MODULE.main(ARGUMENTS)``. A rank that
torchrun or srun started comes by way of `cli`, and calls `defer_compilation` too.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any


def defer_compilation() -> None:
    """Let Megatron's fused functions be compiled when they are first called.

    Megatron-Core decorates some forty functions with `torch.compile` while it is imported, and the
    first of them loads Dynamo and Inductor: a third of the time that a process takes to start, for
    functions that our models don't call. What is not Megatron's is compiled as ever.
    """
    import torch

    at_once: Callable[..., Any] = torch.compile
    if getattr(at_once, "defers", False):
        return

    def compile_later(model: Any = None, **options: Any) -> Any:  # named as torch does
        module = getattr(model, "__module__", None) or ""
        if not isinstance(model, FunctionType) or not module.startswith("megatron."):
            return at_once(model, **options)

        @functools.cache
        def compiled() -> Any:
            return at_once(model, **options)

        @functools.wraps(model)
        def call(*args: Any, **kwargs: Any) -> Any:
            # One fused function may call another, which is then compiled as a part of it.
            inner = torch.compiler.is_compiling()
            return (model if inner else compiled())(*args, **kwargs)

        return call

    compile_later.defers = True  # type: ignore[attr-defined]
    torch.compile = compile_later


def main() -> None:
    _, module, *arguments = sys.argv
    defer_compilation()
    importlib.import_module(module).main(arguments)


if __name__ == "__main__":
    main()
