"""Configurations and cluster files that come with the project, found by their names.

In a checkout they are in ``configs/`` and ``launch/clusters/``; a wheel carries copies of both in
``proma_megatron/shipped/``.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def find_config(path: Path) -> Path:
    """Find the configuration that is meant by a path, or by a name such as ``quickstart``.

    A file that is there comes first. Otherwise ``quickstart``, ``quickstart.yaml`` and
    ``configs/quickstart.yaml`` are the shipped one. What is unknown is returned as it is, so that
    the reader's own error names it.
    """
    return _find(path, "configs")


def find_cluster(path: Path) -> Path:
    """Find a cluster file as `find_config` does: ``modules``, ``launch/clusters/modules.yaml``."""
    return _find(path, "launch/clusters")


def _find(path: Path, folder: str) -> Path:
    if path.is_file() or path.parent not in (Path(), Path(folder)):
        return path
    name = path.name if path.suffix == ".yaml" else f"{path.name}.yaml"  # qwen3_0.6b: no suffix
    for place in (PACKAGE / "shipped" / Path(folder).name, PACKAGE.parent / folder):
        if (place / name).is_file():
            return place / name
    return path
