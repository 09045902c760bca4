"""How the child process of a part tells what it found."""

from __future__ import annotations

from importlib import metadata

MARK = "proma doctor: "  # before a child's result, which may follow what libraries print


def installed_version(name: str) -> str:
    """Return a distribution's version; "" for a folder on the path, which nothing has installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
