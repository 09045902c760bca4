"""The folder of a run's checkpoints: which are complete, which come last, which may go.

A checkpoint is a folder, ``step_000050`` or, in the supervised warm start, ``warm_start_000020``.
It is complete once it holds its marker, which is written last, when every rank has finished and all
files are on the disk. Without the marker nothing reads it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from proma_megatron.errors import ConfigError, StorageError
from proma_megatron.files import write_synced

MARKER = "complete.json"
PREFIXES = {"warm_start": "warm_start_", "rl": "step_"}  # in the order of a run's phases
LATEST, BEST = "latest", "best"  # links


@dataclass(frozen=True)
class Marker:
    """What a complete checkpoint says of itself."""

    phase: str  # "warm_start" or "rl"
    step: int  # of the phase; so many are done
    state: dict[str, Any]  # where the run goes on: `keeper.Position`
    model: dict[str, Any]  # `compatibility.shape_of`
    layout: dict[str, Any]  # `compatibility.layout_of`
    optimizer: dict[str, Any] = field(default_factory=dict)  # `compatibility.optimizer_of`
    holds: tuple[str, ...] = ()  # beside the weights; `sharded.Contents.names`
    score: float | None = None  # validation accuracy of these weights, where it was measured
    files: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # name: bytes and CRC-32


def name_of(phase: str, step: int) -> str:
    return f"{PREFIXES[phase]}{step:06d}"


def is_warm_start(path: Path) -> bool:
    """Tell whether a checkpoint is of the supervised warm start."""
    return path.name.startswith(PREFIXES["warm_start"])


def checkpoints(folder: Path) -> list[Path]:
    """Return every checkpoint, complete or not, in the order of the run."""
    found = []
    for entry in _entries(folder):
        for order, prefix in enumerate(PREFIXES.values()):
            number = entry.name.removeprefix(prefix)
            numbered = entry.name.startswith(prefix) and number.isdecimal()
            if numbered and entry.is_dir(follow_symlinks=False):
                found.append(((order, int(number)), folder / entry.name))
    return [path for _, path in sorted(found)]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is in the folder; nothing if it was never made.

    A listing that fails must not be taken for an empty one: runs are started anew on its word.
    """
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        if not folder.is_symlink():  # else to a disk that is not there now
            return []
        reason = "it links to what is not there"
    except OSError as error:
        reason = error.strerror or str(error)
    raise StorageError(
        f"{folder} can't be listed ({reason}), expected the folder of a run's checkpoints; mend "
        "the disk or its mount, or use another name"
    )


def is_complete(path: Path) -> bool:
    return (path / MARKER).is_file()


def newest(folder: Path) -> Path | None:
    """Return the complete checkpoint that the run reached last."""
    return next((path for path in reversed(checkpoints(folder)) if is_complete(path)), None)


def best(folder: Path, without: Collection[Path] = ()) -> Path | None:
    """Return the complete checkpoint with the highest validation accuracy; of equals, the first."""
    return next((path for path in _by_score(folder) if path not in without), None)


def expendable(folder: Path, keep_last: int | None, keep_best: int) -> list[Path]:
    """Return complete checkpoints that may be removed, oldest first.

    Kept are the last ``keep_last`` of them (None: all), the ``keep_best`` with the highest
    validation accuracy, and the policy that RL started from, to which divergences are measured. Of
    a warm start nothing is needed once RL has begun.
    """
    complete = [path for path in checkpoints(folder) if is_complete(path)]
    started = name_of("rl", 0)
    warm = [path for path in complete if is_warm_start(path)]
    begun = len(warm) < len(complete)
    go = warm if begun else []
    if keep_last is not None:
        last = complete[-keep_last:]
        chosen = {*last, *_by_score(folder)[:keep_best], folder / started}
        go = [path for path in complete if path not in chosen or (begun and path in warm)]
    return go


def remove(path: Path) -> None:
    """Remove a checkpoint, its marker first: what a crash leaves of it counts as incomplete.

    Where the disk refuses, all of it stays: this is also called after a save that the disk refused.
    """
    try:
        (path / MARKER).unlink(missing_ok=True)
    except OSError:
        return
    shutil.rmtree(path, ignore_errors=True)


def point(folder: Path, link: str, target: Path | None) -> None:
    """Let the link name this checkpoint; the old one stays until the new one is there."""
    place = folder / link
    if target is None:
        place.unlink(missing_ok=True)
        return
    part = folder / f".{link}.part"
    part.unlink(missing_ok=True)
    part.symlink_to(target.name)
    part.replace(place)


def write_marker(path: Path, marker: Marker) -> None:
    """Complete a checkpoint whose files are on the disk."""
    write_synced(path / MARKER, json.dumps(asdict(marker)))


def read_marker(path: Path) -> Marker:
    """Read what a checkpoint says of itself.

    Raises:
        ConfigError: it is not complete.
        StorageError: its marker can't be read.
    """
    marker = path / MARKER
    if not marker.is_file():
        raise ConfigError(
            f"{path} is no complete checkpoint: it has no {MARKER}; choose another one"
        )
    try:
        fields = json.loads(marker.read_text())
        files = {name: (int(size), int(crc)) for name, (size, crc) in fields["files"].items()}
        return Marker(**{**fields, "files": files, "holds": tuple(fields["holds"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise StorageError(
            f"{marker} can't be read ({error}), expected what this version of proma writes; remove "
            f"{path.name} to go on from the checkpoint before it"
        ) from None


def _by_score(folder: Path) -> list[Path]:
    """Return complete checkpoints with a validation accuracy, best first, equals as they come."""
    scored = []
    for place, path in enumerate(checkpoints(folder)):
        try:
            score = read_marker(path).score
        except (ConfigError, StorageError):  # incomplete, or damaged: who loads it is told
            continue
        if score is not None:
            scored.append((-score, place, path))
    return [path for _, _, path in sorted(scored)]
