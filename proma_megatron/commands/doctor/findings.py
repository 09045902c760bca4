"""One part of a machine, as a child process found it.

Each part is tried in a process of its own: a library that aborts, hangs or exits takes no other
with it, and what it says becomes the finding.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Literal

import psutil

from proma_megatron.commands.doctor.told import MARK, installed_version

State = Literal["works", "absent", "unused", "broken"]

TIMEOUT = 180.0  # seconds for one part; the first import of a large library from a network disk
PROBES = "proma_megatron.commands.doctor.probes"
# One after the other: some clusters let a GPU serve one process at a time.
ON_GPUS = ("gpus", "nccl", "megatron-core", "transformer-engine", "apex")

# How torchrun and srun tell a process that it is one of many; a child would wait for the others.
_MANY = re.compile(
    r"(RANK|WORLD_SIZE|(LOCAL|GROUP|ROLE)_(RANK|WORLD_SIZE|NAME)|MASTER_(ADDR|PORT)|TORCHELASTIC_.*)"
)
# A line of a traceback with the error, in one process or, after its number, in one of several.
_ERROR = re.compile(
    r"^(?:\[rank\d+\]: ?)?([A-Za-z_][\w.]*(?:Error|Exception)(?::.*)?)$", re.MULTILINE
)


@dataclass(frozen=True)
class Finding:
    """What one part is and does."""

    name: str
    state: State
    version: str = ""
    detail: str = ""  # what was tried, or what went wrong
    fix: str = ""  # what a person does about it, or could do better where it works
    recipes: tuple[str, ...] = ()  # Transformer Engine: values of model.fp8 that worked


def look(names: Sequence[str], timeout: float = TIMEOUT) -> list[Finding]:
    """Try every part, some at the same time."""
    turn = Lock()

    def look_in_turn(name: str) -> Finding:
        with turn if name in ON_GPUS else nullcontext():
            return _look(name, timeout)

    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(look_in_turn, names))


def _look(name: str, timeout: float) -> Finding:
    child = subprocess.Popen(
        [sys.executable, "-m", PROBES, name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={key: value for key, value in os.environ.items() if not _MANY.fullmatch(key)},
    )
    try:
        stdout, stderr = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _end(child)
        return _broken(name, f"no answer within {timeout:.0f} s")
    results = [line for line in stdout.splitlines() if line.startswith(MARK)]
    if child.returncode == 0 and results:
        told = json.loads(results[-1].removeprefix(MARK))
        return Finding(name, **{**told, "recipes": tuple(told.get("recipes", ()))})
    return _broken(name, _reason(child.returncode, stderr))


def _broken(name: str, detail: str) -> Finding:
    return Finding(name, "broken", installed_version(name), detail)


def _end(child: subprocess.Popen[str]) -> None:
    """End a child with the ranks that it started, which would hold its pipes open."""
    for process in (*psutil.Process(child.pid).children(recursive=True), child):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    child.communicate()


def _reason(code: int, stderr: str) -> str:
    """Return the error that ended a child: the last of its tracebacks, or its signal."""
    if code < 0:
        return f"ended by signal {-code}"
    errors = _ERROR.findall(stderr)
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return [f"exit code {code}", *lines[-1:], *errors[-1:]][-1]
