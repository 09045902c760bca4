"""Weights of Hugging Face directories of dense Qwen models, read in slices.

Everything is checked against config.json and the safetensors headers before any weight is loaded. A
directory whose tensors are not those of the model is refused: a tensor that nobody reads would be
a different model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from proma_megatron.config.model import ComputeConfig, ModelConfig
from proma_megatron.config.pretrained import read_json, read_shape
from proma_megatron.errors import ConfigError
from proma_megatron.weights.mapping import tensor_shapes

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMPARED = 4096  # rows of two tables at a time
DTYPES = ("F64", "F32", "F16", "BF16")  # as safetensors spells them


@dataclass(frozen=True)
class HuggingFaceModel:
    """A directory whose configuration and tensors were found to fit together."""

    path: Path
    model: ModelConfig
    vocab_size: int  # rows of the embedding
    files: Mapping[str, str]  # tensor -> file that holds it
    dtypes: frozenset[str]  # of the tensors, as safetensors spells them

    def read(self, name: str) -> TensorSlices:
        """Open one tensor, of which only what is narrowed to leaves the disk."""
        return TensorSlices(self.path / self.files[name], name)


@dataclass(frozen=True)
class TensorSlices:
    """A tensor in a safetensors file, read by slices."""

    file: Path
    name: str

    def narrow(self, axis: int, start: int, length: int) -> torch.Tensor:
        """Narrow as `torch.Tensor.narrow`, for the first two axes.

        Raises:
            ConfigError: the file can't be read, or there is a NaN or an infinity in this slice.
        """
        stop = start + length
        try:
            with safe_open(self.file, framework="pt") as opened:
                rows = opened.get_slice(self.name)
                found = rows[start:stop] if axis == 0 else rows[:, start:stop]
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.file, error) from None
        if not bool(found.isfinite().all()):
            raise ConfigError(
                f"{self.file}: {self.name} holds NaN or infinity, expected finite weights; "
                "download it again"
            )
        return found


def read_model(
    path: Path, compute: ComputeConfig, *, compare_head: bool = True
) -> HuggingFaceModel:
    """Open the model of a Hugging Face directory, checked, with weights still on disk.

    Args:
        compare_head: where a tied model stores its head as well, whether to read both tables and
            see that they are equal: once a run, not on every rank.

    Raises:
        ConfigError: the directory is no dense Qwen2, Qwen2.5 or Qwen3 that can be run here, or its
            tensors are not those that its configuration asks for.
    """
    shape = read_shape(path)
    vocab_size = shape.pop("vocab_size")
    model = ModelConfig(dtype=compute.dtype, recompute=compute.recompute, **shape)
    files = _find_tensors(path)
    dtypes = _check_tensors(path, files, model, vocab_size)
    if compare_head:
        _check_head(path, files, model)
    return HuggingFaceModel(path, model, vocab_size, files, dtypes)


# --------------------------------------------------------------------------- safetensors


def conversion_note(found: HuggingFaceModel) -> str | None:
    """Say what loading rounds; None if the weights are computed in as they are stored."""
    computed = {"float64": "F64", "float32": "F32", "bfloat16": "BF16"}[found.model.dtype]
    exact = {"F64": DTYPES, "F32": ("F32", "F16", "BF16"), "BF16": ("BF16",)}[computed]
    rounded = sorted(found.dtypes - set(exact))
    if not rounded:
        return None
    return (
        f"weights in {found.path} are stored in {', '.join(sorted(found.dtypes))} and are rounded "
        f"to model.dtype={found.model.dtype}"
    )


def _find_tensors(path: Path) -> dict[str, str]:
    """Find every tensor with the file that holds it: from the only file, or from the index."""
    single, index = path / WEIGHTS, path / INDEX
    if single.is_file():  # transformers, too, looks for it first
        return dict.fromkeys(_names(single), single.name)
    if not index.is_file():
        raise ConfigError(
            f"{path} has neither {single.name} nor {index.name}; give a model in safetensors format"
        )
    listed = read_json(path, index.name).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(at, str) for at in listed.values()):
        raise ConfigError(f"{index} has no 'weight_map' from tensors to files; download it again")
    for file in sorted(set(listed.values())):
        named = {name for name, at in listed.items() if at == file}
        present = _names(path / file)
        for name in sorted(named - present):
            raise ConfigError(f"{path / file} has no tensor {name}, which the index puts there")
        for name in sorted(present - named):
            raise ConfigError(f"{path / file} holds {name}, which the index does not put there")
    return listed


def _names(file: Path) -> set[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{file} can't be read ({error}); download it again")


def _check_tensors(
    path: Path, files: dict[str, str], model: ModelConfig, vocab_size: int
) -> frozenset[str]:
    """Check that every tensor is there in its shape, and no other; return their dtypes."""
    dtypes = set()
    shapes = tensor_shapes(model, vocab_size)
    missing = [name for name in shapes if name not in files]
    if missing:
        raise ConfigError(f"{path} lacks {_listed(missing)}, which its config.json asks for")
    copy = HEAD if model.tie_embeddings else None
    unknown = [name for name in files if name not in shapes and name != copy]
    if unknown:
        raise ConfigError(f"{path} holds {_listed(unknown)}, which no part of the model reads")
    for name, expected in shapes.items():
        with safe_open(path / files[name], framework="pt") as opened:
            header = opened.get_slice(name)
            found, dtype = tuple(header.get_shape()), header.get_dtype()
        if dtype not in DTYPES:
            raise ConfigError(
                f"{path}: {name} has dtype {dtype}, expected one of {', '.join(DTYPES)}; give the "
                "unquantized model"
            )
        if found != expected:
            raise ConfigError(
                f"{path}: {name} has shape {list(found)}, expected {list(expected)} by its "
                "config.json"
            )
        dtypes.add(dtype)
    return frozenset(dtypes)


def _check_head(path: Path, files: dict[str, str], model: ModelConfig) -> None:
    """Check that a head that a tied model stores is the embedding."""
    if model.tie_embeddings and HEAD in files and not _equal(path, files, HEAD, EMBEDDING):
        raise ConfigError(
            f"{path}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}"
        )


def _equal(path: Path, files: dict[str, str], first: str, second: str) -> bool:
    """Tell whether two tables are equal, read a few rows at a time."""
    with (
        safe_open(path / files[first], framework="pt") as one,
        safe_open(path / files[second], framework="pt") as other,
    ):
        a, b = one.get_slice(first), other.get_slice(second)
        rows = a.get_shape()[0]
        if a.get_shape() != b.get_shape():
            return False
        return all(
            torch.equal(a[at : at + COMPARED], b[at : at + COMPARED])
            for at in range(0, rows, COMPARED)
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return names[0] + more
