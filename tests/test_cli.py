"""The list of commands: what it loads."""

from __future__ import annotations

import subprocess
import sys


def test_the_list_of_commands_loads_nothing_heavy() -> None:
    """`proma --help`, and each command's own words, come at once."""
    program = (
        "import sys, proma_megatron.cli;"
        "print(*{'torch', 'pydantic', 'omegaconf', 'numpy', 'megatron'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout.split() == [], found.stderr
    assert found.returncode == 0
