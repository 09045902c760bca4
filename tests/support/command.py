"""The `proma` command: as a shell starts it, or in this process with ranks that are forked."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from proma_megatron.cli import main
from proma_megatron.processes.elastic import Starter, starting_ranks
from support.forked import forked_start_ranks

ROOT = Path(__file__).parents[2]


def proma(
    *arguments: str, cwd: Path = ROOT, launcher: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run it to its end.

    Args:
        launcher: what starts ``-m proma_megatron.cli`` instead of Python.
        environment: variables on top of this process's own; PYTHONPATH after the project.
    """
    program = launcher or (sys.executable,)
    search = [str(ROOT), environment.pop("PYTHONPATH", "")]
    return subprocess.run(
        [*program, "-m", "proma_megatron.cli", *arguments],
        cwd=cwd,
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, search))},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def forked_proma(
    *arguments: str, cwd: Path = ROOT, start: Starter = forked_start_ranks
) -> subprocess.CompletedProcess[str]:
    """Run it to its end in this process, from a folder whose modules it finds; ranks are real.

    Args:
        start: what starts the ranks.
    """
    with (
        contextlib.chdir(cwd),
        mock.patch.object(sys, "path", [str(cwd), *sys.path]),
        starting_ranks(start),
    ):
        return proma_here(*arguments)


def proma_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run it to its end in this process, as it is."""
    stdout, stderr = io.StringIO(), io.StringIO()
    words = [str(word) for word in arguments]
    with (
        mock.patch.object(sys, "argv", ["proma", *words]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as left,
    ):
        main()
    code = left.value.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(words, code, stdout.getvalue(), stderr.getvalue())
