"""The `proma` command, as a shell starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
