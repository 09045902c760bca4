"""Whether a checkpoint is still what was written, and holds nothing that runs when it is read.

What is trusted: numbers. Weights, moments and random states are tensors, positions are JSON. Two
things in a checkpoint of PyTorch's format are pickles, and unpickling runs what the file says:

- ``.metadata``, the index of all tensors, which PyTorch loads with plain pickle. `check_index`
  reads it first, with an unpickler that knows a dozen harmless classes and refuses all others;
- small objects such as the learning-rate schedule, which `weights_only` loads: PyTorch's own
  unpickler for plain values and tensors.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from proma_megatron.errors import StorageError
from proma_megatron.files import size_and_checksum
from proma_megatron.runs.checkpoint_folder import Marker, name_of

INDEX = ".metadata"

# What an index is made of. A module of which all names would be allowed could call anything.
_INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "ChunkStorageMetadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    },
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "Path"},
}


def check_sizes(path: Path, marker: Marker) -> None:
    """Check that every file is there with its size, without reading any.

    Raises:
        StorageError: a file is missing, or not as long as it was.
    """
    for name, (size, _) in sorted(marker.files.items()):
        file = path / name
        if not file.is_file():
            raise StorageError(f"{file} is missing, {_expected(path, size)}")
        found = file.stat().st_size
        if found != size:
            raise StorageError(f"{file} has {found:,} bytes, {_expected(path, size)}")


def check_contents(path: Path, marker: Marker, part: int, parts: int) -> None:
    """Check that this part of the files is bit by bit what was written; every rank reads one.

    Raises:
        StorageError: a file has changed, or can't be read.
    """
    for name, (size, checksum) in sorted(marker.files.items())[part::parts]:
        file = path / name
        try:
            found = size_and_checksum(file)
        except OSError as error:
            raise StorageError(
                f"{file} can't be read ({error.strerror}), {_expected(path, size)}"
            ) from None
        if found != (size, checksum):
            raise StorageError(f"{file} is damaged: its checksum is wrong, {_expected(path, size)}")


def check_index(path: Path) -> None:
    """Check that the index of a checkpoint is made of nothing but an index's classes.

    Raises:
        StorageError: it is not, or it is no index.
    """
    file = path / INDEX
    try:
        with file.open("rb") as stream:
            _IndexReader(stream).load()
    except Exception as error:  # bytes that are no pickle can raise anything
        raise StorageError(
            f"{file} can't be read as a checkpoint's index ({error}), so nothing of it was loaded; "
            "use a checkpoint that proma wrote"
        ) from None


@contextmanager
def plain_values_only() -> Iterator[None]:
    """Let `torch.load` build only plain values and tensors in the ``with`` block, whoever calls it.

    PyTorch's checkpoint reader asks for the other kind, which would run what a file says.
    """
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class _IndexReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and _is_dtype(name):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _is_dtype(name: str) -> bool:
    import torch  # seconds, which a look at sizes does not need

    return isinstance(getattr(torch, name, None), torch.dtype)


def _expected(path: Path, size: int) -> str:
    way = f"remove {path.name} to go on from the checkpoint before it"
    if path.name == name_of("rl", 0):  # of which every other one has need
        way = f"bring {path.name} back from a copy, for it holds the policy that RL started from"
    return f"expected {size:,} bytes; {way}"
