"""Hugging Face directories of dense Qwen models: their shape, and their weights in slices.

Everything is read off ``config.json`` and the safetensors headers before any weight is loaded. What
this code can't honour is refused by name, and so is a directory whose tensors are not those of the
model: a tensor that nobody reads would be a different model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from proma_megatron.config import ComputeConfig, ConfigError, ModelConfig
from proma_megatron.policy.parameters import tensor_shapes

# How config.json spells what ModelConfig checks.
SPELLED: dict[Any, str] = {
    "norm_eps": "rms_norm_eps",
    "rope_base": "rope_theta",
    "tie_embeddings": "tie_word_embeddings",
}
FAMILIES = ("qwen2", "qwen3")  # Qwen2.5 calls itself qwen2


@dataclass(frozen=True)
class HuggingFaceModel:
    """A directory whose configuration and tensors were found to fit together."""

    path: Path
    model: ModelConfig
    vocab_size: int  # rows of the embedding
    files: Mapping[str, str]  # tensor -> file that holds it

    def read(self, name: str) -> TensorSlices:
        """One tensor, of which only what is narrowed to leaves the disk."""
        return TensorSlices(self.path / self.files[name], name)


@dataclass(frozen=True)
class TensorSlices:
    """A tensor in a safetensors file, read by slices."""

    file: Path
    name: str

    def narrow(self, axis: int, start: int, length: int) -> torch.Tensor:
        """As `torch.Tensor.narrow`, for the first two axes."""
        with safe_open(self.file, framework="pt") as opened:
            rows = opened.get_slice(self.name)
            stop = start + length
            return rows[start:stop] if axis == 0 else rows[:, start:stop]


def read_model(path: Path, compute: ComputeConfig) -> HuggingFaceModel:
    """The model of a Hugging Face directory, checked, with weights still on disk.

    Raises:
        ConfigError: the directory is no dense Qwen2, Qwen2.5 or Qwen3 that can be run here, or its
            tensors are not those that its configuration asks for.
    """
    fields = _read_json(path, "config.json")
    model, vocab_size = _read_shape(path, fields, compute)
    files = _find_tensors(path)
    _check_tensors(path, files, model, vocab_size)
    return HuggingFaceModel(path, model, vocab_size, files)


def _read_json(path: Path, name: str) -> dict[str, Any]:
    if not path.is_dir():
        raise ConfigError(f"{path} is no directory; give the folder of a Hugging Face Qwen model")
    file = path / name
    if not file.is_file():
        raise ConfigError(
            f"{path} has no {name}, expected the folder of a Hugging Face Qwen model; check the "
            "path"
        )
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} can't be read as JSON ({error}); download it again") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds {type(found).__name__}, expected a JSON object")
    return found


# --------------------------------------------------------------------------- config.json


def _read_shape(
    path: Path, fields: dict[str, Any], compute: ComputeConfig
) -> tuple[ModelConfig, int]:
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(
            f"{path} is a {family or 'model without model_type'}, expected a dense Qwen model "
            f"(model_type {' or '.join(FAMILIES)})"
        )
    for problem in _unsupported(fields):
        raise ConfigError(f"{path / 'config.json'}: {problem}")

    def size(key: str, default: int | None = None) -> int:
        value = default if fields.get(key) is None else fields[key]
        if not isinstance(value, int) or value <= 0:
            raise ConfigError(
                f"{path / 'config.json'}: {key} is {value!r}, expected a positive integer"
            )
        return value

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    shape: dict[str, Any] = {
        "norm_eps": fields.get("rms_norm_eps"),
        "rope_base": _rope(fields).get("rope_theta"),
        "tie_embeddings": fields.get("tie_word_embeddings", False),
    }
    try:
        model = ModelConfig(
            hidden_size=hidden,
            ffn_hidden_size=size("intermediate_size"),
            layers=size("num_hidden_layers"),
            heads=heads,
            kv_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", hidden // heads),
            qk_norm=family == "qwen3",
            qkv_bias=family == "qwen2",
            dtype=compute.dtype,
            recompute=compute.recompute,
            **shape,
        )
    except ValidationError as error:
        fault = error.errors()[0]
        raise ConfigError(
            f"{path / 'config.json'}: {SPELLED.get(fault['loc'][0], fault['loc'][0])} is "
            f"{fault['input']!r}, but {fault['msg'][0].lower()}{fault['msg'][1:]}"
        ) from None
    return model, size("vocab_size")


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters as transformers 5 writes them, or at top level as earlier versions did."""
    rope = fields.get("rope_parameters")
    return rope if isinstance(rope, dict) else fields


def _unsupported(fields: dict[str, Any]) -> Iterator[str]:
    """What the configuration asks for and Megatron's layers here don't do."""
    for key in ("rope_parameters", "rope_scaling"):  # both may be there; both must be plain
        rope = fields.get(key) or {}
        if not isinstance(rope, dict):
            yield f"{key} is {rope!r}, expected an object"
            continue
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind != "default":
            yield f"rope_type is '{kind}' in {key}, of which only 'default' is supported"
    if fields.get("use_sliding_window"):
        yield "use_sliding_window is true, but only full attention is supported"
    layers = fields.get("layer_types") or []
    if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
        yield f"layer_types is {layers}, but only 'full_attention' is supported"
    if fields.get("attention_bias"):
        yield "attention_bias is true, which Qwen3's published models don't have"
    if fields.get("hidden_act", "silu") != "silu":
        yield f"hidden_act is '{fields['hidden_act']}', expected 'silu'"
    if fields.get("quantization_config"):
        yield "the weights are quantized; give the unquantized model"


# --------------------------------------------------------------------------- safetensors


def _find_tensors(path: Path) -> dict[str, str]:
    """Every tensor with the file that holds it: from the only file, or from the index."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():  # transformers, too, looks for it first
        return dict.fromkeys(_names(single), single.name)
    if not index.is_file():
        raise ConfigError(
            f"{path} has neither {single.name} nor {index.name}; give a model in safetensors format"
        )
    listed = _read_json(path, index.name).get("weight_map")
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
        raise ConfigError(f"{file} can't be read ({error}); download it again") from None


def _check_tensors(path: Path, files: dict[str, str], model: ModelConfig, vocab_size: int) -> None:
    """Every tensor of the model is there in its shape, and no other."""
    shapes = tensor_shapes(model, vocab_size)
    missing = [name for name in shapes if name not in files]
    if missing:
        raise ConfigError(f"{path} lacks {_listed(missing)}, which its config.json asks for")
    copies = {"lm_head.weight": "model.embed_tokens.weight"} if model.tie_embeddings else {}
    unknown = [name for name in files if name not in shapes and name not in copies]
    if unknown:
        raise ConfigError(f"{path} holds {_listed(unknown)}, which no part of the model reads")
    for name, expected in shapes.items():
        with safe_open(path / files[name], framework="pt") as opened:
            found = tuple(opened.get_slice(name).get_shape())
        if found != expected:
            raise ConfigError(
                f"{path}: {name} has shape {list(found)}, expected {list(expected)} by its "
                "config.json"
            )
    for copy, original in copies.items():
        if copy in files and not _equal(path, files, copy, original):
            raise ConfigError(
                f"{path}: tie_word_embeddings is true, but {copy} differs from {original}"
            )


def _equal(path: Path, files: dict[str, str], first: str, second: str) -> bool:
    values = []
    for name in (first, second):
        with safe_open(path / files[name], framework="pt") as opened:
            values.append(opened.get_tensor(name))
    return torch.equal(*values)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return names[0] + more
