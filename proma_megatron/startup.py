"""Where the process of a rank begins, before anything loads Megatron-Core.

``python -m proma_megatron.startup MODULE ARGUMENTS`` runs ``MODULE.main(ARGUMENTS)``.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any


def defer_compilation() -> None:
    """Let Megatron's fused functions be compiled when they are first called.

    Megatron-Core decorates some forty functions with `torch.compile` while it is imported, and the
    first of them loads Dynamo and Inductor: a third of the time that a process takes to start, for
    functions that a dense model on a CPU never calls. Other functions are compiled as ever.
    """
    import torch

    at_once: Callable[..., Any] = torch.compile
    if getattr(at_once, "defers", False):
        return

    def compile_later(function: Any = None, **options: Any) -> Any:
        if not getattr(function, "__module__", "").startswith("megatron."):
            return at_once(function, **options)

        @functools.cache
        def compiled() -> Any:
            return at_once(function, **options)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled()(*args, **kwargs)

        return call

    compile_later.defers = True  # type: ignore[attr-defined]
    torch.compile = compile_later


def main() -> None:
    _, module, *arguments = sys.argv
    defer_compilation()
    importlib.import_module(module).main(arguments)


if __name__ == "__main__":
    main()
