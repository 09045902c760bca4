"""What one run has otherwise than another one that nothing happened to: bit by bit, all of it."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from proma_megatron.observability.metrics import read_metrics
from proma_megatron.runs.checkpoint_folder import checkpoints, is_complete, read_marker
from proma_megatron.runs.directory import RunDir
from support.pooled import untimed


def differences(expected: RunDir, found: RunDir) -> list[str]:
    """What of a run was lost, or came out otherwise; empty: nothing.

    Compared are the rows of metrics and samples in their order, every completion of validations,
    and all that complete checkpoints hold: weights, moments, schedule, running mean, random states,
    positions. Checkpoints that only ``found`` has, as a stop leaves them, don't count.
    """
    return [
        *_rows(expected.metrics, found.metrics),
        *_rows(expected.samples, found.samples),
        *_evaluations(expected, found),
        *_checkpoints(expected, found),
    ]


def _rows(expected: Path, found: Path) -> Iterator[str]:
    ours, theirs = (list(map(untimed, read_metrics(path))) for path in (expected, found))
    places = [[(row["phase"], row["step"]) for row in rows] for rows in (ours, theirs)]
    if places[0] != places[1]:
        yield f"{expected.name}: rows of {places[1]} instead of {places[0]}"
        return
    for place, one, other in zip(places[0], ours, theirs, strict=True):
        keys = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
        if keys:
            yield f"{expected.name}: {keys} of {place}, {one.get(keys[0])} -> {other.get(keys[0])}"


def _evaluations(expected: RunDir, found: RunDir) -> Iterator[str]:
    for path in sorted((expected.path / "evaluation").iterdir()):
        other = found.path / "evaluation" / path.name
        if not other.is_file() or other.read_bytes() != path.read_bytes():
            yield f"evaluation/{path.name}"


def _checkpoints(expected: RunDir, found: RunDir) -> Iterator[str]:
    for path in checkpoints(expected.checkpoints):
        other = found.checkpoints / path.name
        if not is_complete(other):
            yield f"{path.name} is missing"
            continue
        if _position(path) != _position(other):
            yield f"{path.name}: position {_position(other)} instead of {_position(path)}"
        yield from (f"{path.name}: {key}" for key in different_values(path, other))


def different_values(one: Path, other: Path) -> list[str]:
    """Names of what two checkpoints hold and is not bit by bit the same."""
    ours, theirs = values(one), values(other)
    return sorted(
        key
        for key in ours.keys() | theirs.keys()
        if key not in ours or key not in theirs or not _same(ours[key], theirs[key])
    )


def values(checkpoint: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint, whole whatever layout saved it, and every small object."""
    index = FileSystemReader(checkpoint).read_metadata()
    found = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else io.BytesIO()
        for key, entry in index.state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is there
        dcp.load(found, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    return found


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and _same_bits(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    ours, theirs = (tensor.reshape(-1).contiguous() for tensor in (one, other))
    return torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def _position(checkpoint: Path) -> dict[str, Any]:
    """A marker without sizes, in which digits of seconds count."""
    fields = asdict(read_marker(checkpoint))
    state = {key: value for key, value in fields["state"].items() if key != "files"}
    return json.loads(json.dumps({**fields, "state": state, "files": None}))
