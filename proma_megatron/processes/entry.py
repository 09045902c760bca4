"""Where a rank that we start begins, before anything loads Megatron-Core.

``python -m proma_megatron.processes.entry MODULE ARGUMENTS`` runs ``MODULE.main(ARGUMENTS)``. A
rank that torchrun or srun started comes by way of `cli`, and calls `defer_compilation` too.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import signal
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

from proma_megatron.processes import logs
from proma_megatron.processes.failures import LAUNCHED

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


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


def end_with_launcher() -> None:
    """Have the kernel end this rank when its launcher is gone, however that ended.

    It would train on, and write into a run directory that the next attempt takes for its own.
    """
    launcher = os.environ.get(LAUNCHED)
    if launcher is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it has ended before
        os._exit(1)


def main() -> None:
    _, module, *arguments = sys.argv
    end_with_launcher()
    logs.configure()
    defer_compilation()
    importlib.import_module(module).main(arguments)


if __name__ == "__main__":
    main()
