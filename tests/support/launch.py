"""What tests of `launch` share: cluster files, the command in this process, stand-in programs."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from proma_megatron.errors import UnreachableError
from proma_megatron.launching.cluster import Cluster

ROOT = Path(__file__).parents[2]
CLUSTERS = sorted((ROOT / "launch" / "clusters").glob("*.yaml"))
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SMALLEST: dict[str, Any] = {"account": "lab", "time": "01:00:00", "gpus_per_node": 2}
SSH = {"host": "login", "user": "ada", "job_dir": "/jobs"}
CONTAINER = {"image": "/proma.sqsh", "mounts": ["/lustre:/lustre"]}


def site(**changes: Any) -> Cluster:
    """A cluster of nodes with two GPUs; None takes a key away."""
    return Cluster.model_validate(tree(**changes))


def tree(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**SMALLEST, **changes}.items() if value is not None}


def cluster_file(folder: Path, **changes: Any) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(tree(**changes)))
    return path


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=Ada", "-c", "user.email=ada@lab.example")
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def files_of(folder: Path) -> list[str]:
    """All files below a folder, relative to it."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


class Programs:
    """A folder of stand-in programs, each a few lines of bash, and scripts that find them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def search(self) -> str:
        return f"{self.folder}:/usr/local/bin:/usr/bin:/bin"

    def add(self, name: str, lines: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/bash\n{lines}\n")
        path.chmod(0o755)

    def start(self, script: str, **environment: str) -> subprocess.Popen[str]:
        path = self.folder / "script-to-run"
        path.write_text(script)
        return subprocess.Popen(
            ["bash", str(path)],
            env={"PATH": self.search, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def bash(self, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(script, **environment)
        stdout, stderr = process.communicate(timeout=20)
        return subprocess.CompletedProcess("bash", process.returncode, stdout, stderr)


class Script:
    """A cluster that gives one answer after the other; None: it can't be reached.

    Attributes:
        asked: the commands so far.
    """

    def __init__(self, answers: Sequence[str | None]) -> None:
        self._answers: Iterator[str | None] = iter(answers)
        self.asked: list[str] = []

    def run(self, command: str) -> str:
        self.asked.append(command)
        answer = next(self._answers)
        if answer is None:
            raise UnreachableError("login does not answer: timed out")
        return answer


# NeMo-Run submits jobs that don't depend on each other at the same time.
SBATCH = r"""
id=101
until (set -C; echo "$*" > "$0.job$id") 2>/dev/null; do id=$((id + 1)); done
env -0 > "$0.environment"
if [ -e "$0.accepts" ] && [ $((id - 100)) -gt "$(cat "$0.accepts")" ]; then
  echo "sbatch: error: Invalid account" >&2
  exit 1
fi
echo $id
"""


_TOOLS = (
    *("bash", "sh", "git", "tar", "gzip", "find", "rm", "mkdir", "env", "grep", "cat"),
    *("base64", "stat", "head", "sed", "tail", "timeout"),
)


class Submitting:
    """A stand-in for Slurm that takes jobs 101, 102, ... and runs none, first on PATH."""

    def __init__(self, programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = programs.folder
        for name in _TOOLS:
            found = shutil.which(name)
            assert found is not None
            (programs.folder / name).symlink_to(found)
        programs.add("sbatch", SBATCH)
        programs.add("scancel", f'echo "$*" >> {programs.folder / "cancelled"}')
        monkeypatch.setenv("PATH", str(programs.folder))  # there may be a real one further on

    def accept(self, jobs: int) -> None:
        """Refuse those that come after so many."""
        (self._folder / "sbatch.accepts").write_text(str(jobs))

    def remove(self) -> None:
        (self._folder / "sbatch").unlink()

    @property
    def submitted(self) -> list[str]:
        """Arguments of sbatch, of job 101 and on."""
        return [path.read_text().strip() for path in sorted(self._folder.glob("sbatch.job*"))]

    @property
    def cancelled(self) -> list[str]:
        """Arguments of scancel."""
        path = self._folder / "cancelled"
        return path.read_text().splitlines() if path.exists() else []

    def environment(self, name: str) -> str | None:
        """A variable of the last job that was submitted."""
        pairs = (self._folder / "sbatch.environment").read_text().split("\0")
        return dict(pair.split("=", 1) for pair in pairs if "=" in pair).get(name)


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def make_key(path: Path) -> Path:
    """A private key that opens nothing."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.chmod(0o600)
    return path
