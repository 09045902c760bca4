"""Importing this makes imports quick that follow, in this process and in those that it starts.

Megatron's functions are compiled when they are first called. And where Python may write no bytecode
beside the modules, processes share a folder of it: each would else compile Megatron's source for
6 s, and a session starts dozens.
"""

from __future__ import annotations

import os
import sys
import tempfile

from proma_megatron.processes.entry import defer_compilation


def _share_bytecode() -> tempfile.TemporaryDirectory[str]:
    """In a folder that is removed when this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="bytecode-", ignore_cleanup_errors=True)
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = folder.name
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    return folder


# A process that another test process started has the folder already.
_alone = sys.dont_write_bytecode and "PYTHONPYCACHEPREFIX" not in os.environ
bytecode = _share_bytecode() if _alone else None
defer_compilation()
