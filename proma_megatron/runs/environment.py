"""What a run was made with: versions, machine, state of the code."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import proma_megatron

_PACKAGES = ("torch", "megatron-core", "numpy", "sentencepiece")


def describe_environment(device: str) -> dict[str, Any]:
    """Return what a reader needs to reproduce the run: versions, git state, device, no hostname."""
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "proma-megatron": proma_megatron.__version__,
    }
    for package in _PACKAGES:
        versions[package] = _version(package)
    checkout = Path(proma_megatron.__file__).resolve().parent.parent
    return {"versions": versions, "git": git_state(checkout), "device": device}


def git_state(checkout: Path) -> dict[str, Any] | None:
    """Return ``{"revision", "dirty"}`` of a checkout's root; None where ``checkout`` is not one.

    A directory inside another project's repository, such as site-packages of a virtual
    environment, is no checkout of this project. ``revision`` is None before the first commit;
    untracked files that git does not ignore count as dirty.
    """
    root = _git(checkout, "rev-parse", "--show-toplevel")
    if root is None or Path(root).resolve() != checkout.resolve():
        return None
    return {
        "revision": _git(checkout, "rev-parse", "--verify", "--quiet", "HEAD"),
        "dirty": bool(_git(checkout, "status", "--porcelain")),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of a git command; None if it fails or there is no git."""
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _version(package: str) -> str | None:
    """Return the installed version; None for a package that is only on PYTHONPATH."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
