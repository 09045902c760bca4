"""Hugging Face's config.json of dense Qwen models: into our shape, and back.

What the code can't honour is refused by name. Nothing here loads torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from proma_megatron.config.model import ModelConfig
from proma_megatron.errors import ConfigError

CONFIG = "config.json"


@dataclass(frozen=True)
class Family:
    """What the layers of a ``model_type`` have, which its config.json doesn't say."""

    name: str  # of the classes in transformers: <name>ForCausalLM
    qk_norm: bool  # RMS norms of queries and keys, a head at a time
    qkv_bias: bool
    free_head_dim: bool = True  # whether heads * head_dim may differ from hidden_size


# By model_type. Qwen2.5 calls itself qwen2.
FAMILIES = {
    "qwen2": Family("Qwen2", qk_norm=False, qkv_bias=True, free_head_dim=False),
    "qwen3": Family("Qwen3", qk_norm=True, qkv_bias=False),
}

# The keys of ModelConfig that config.json decides.
SHAPE = (
    "vocab_size",
    "hidden_size",
    "ffn_hidden_size",
    "layers",
    "heads",
    "kv_heads",
    "head_dim",
    "qk_norm",
    "qkv_bias",
    "tie_embeddings",
    "rope_base",
    "norm_eps",
)
_PUBLISHED = Path(__file__).with_name("published.json")


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Read one JSON object of a Hugging Face directory.

    Raises:
        ConfigError: there is no such directory, file or object.
    """
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


@cache
def published() -> dict[str, dict[str, Any]]:
    """Return what config.json of published models says of their shape, by model name.

    So that a run can be planned before its weights are downloaded.
    """
    return json.loads(_PUBLISHED.read_text())


def read_shape(path: Path) -> dict[str, Any]:
    """Read the shape, as keys of `ModelConfig`, of the model in a Hugging Face directory.

    Raises:
        ConfigError: the directory has no config.json of a dense Qwen model that can be run here.
    """
    return _shape(path / CONFIG, read_json(path, CONFIG))


def planned_shape(path: Path) -> dict[str, Any]:
    """Read a shape as `read_shape`, or look up that of a published model that is not there yet.

    Raises:
        ConfigError: there is neither a directory nor a published model of that name.
    """
    if path.exists():
        return read_shape(path)
    if path.name in published():
        return _shape(path / CONFIG, published()[path.name])
    raise ConfigError(
        f"model.path is {path}, which does not exist; give the folder of a Hugging Face Qwen model "
        f"(a run of {', '.join(published())} can be planned without it)"
    )


def _shape(file: Path, fields: dict[str, Any]) -> dict[str, Any]:
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(
            f"{file.parent} is a {family or 'model without model_type'}, expected a dense Qwen "
            f"model (model_type {' or '.join(FAMILIES)})"
        )
    for problem in _unsupported(fields):
        raise ConfigError(f"{file}: {problem}")

    def size(key: str, default: int | None = None) -> int:
        value = default if fields.get(key) is None else fields[key]
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ConfigError(f"{file}: {key} is {value!r}, expected a positive integer")
        return value

    def number(key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ConfigError(f"{file}: {key} is {value!r}, expected a positive number")
        return float(value)

    tied = fields.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ConfigError(f"{file}: tie_word_embeddings is {tied!r}, expected true or false")
    heads, hidden = size("num_attention_heads"), size("hidden_size")
    return {
        "vocab_size": size("vocab_size"),
        "hidden_size": hidden,
        "ffn_hidden_size": size("intermediate_size"),
        "layers": size("num_hidden_layers"),
        "heads": heads,
        "kv_heads": size("num_key_value_heads", heads),
        "head_dim": size("head_dim", hidden // heads),
        "qk_norm": FAMILIES[family].qk_norm,
        "qkv_bias": FAMILIES[family].qkv_bias,
        "tie_embeddings": tied,
        "rope_base": number("rope_theta", _rope(fields).get("rope_theta")),
        "norm_eps": number("rms_norm_eps", fields.get("rms_norm_eps")),
    }


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    """Return rotary parameters as transformers 5 writes them, or from the top level as before."""
    rope = fields.get("rope_parameters")
    return rope if isinstance(rope, dict) else fields


def _unsupported(fields: dict[str, Any]) -> Iterator[str]:
    """Yield what the configuration asks for and Megatron's layers here don't do."""
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


def write_config(
    model: ModelConfig, vocab_size: int, max_positions: int, dtype: str
) -> dict[str, Any]:
    """Return the config.json of a policy that was not made from a Hugging Face directory.

    Raises:
        ConfigError: no Qwen family has this combination of q/k norm and biases.
    """
    layers = (model.qk_norm, model.qkv_bias)
    fitting = (
        (model_type, family)
        for model_type, family in FAMILIES.items()
        if (family.qk_norm, family.qkv_bias) == layers
    )
    model_type, family = next(fitting, (None, None))
    if family is None:
        raise ConfigError(
            f"model.qk_norm is {_lower(model.qk_norm)} and model.qkv_bias is "
            f"{_lower(model.qkv_bias)}, which no family has ({_described()}); such a policy can't "
            "be exported"
        )
    if not family.free_head_dim and model.head_dim * model.heads != model.hidden_size:
        raise ConfigError(
            f"model.head_dim is {model.head_dim}, but {family.name}'s is always hidden_size / "
            f"heads = {model.hidden_size // model.heads}; such a policy can't be exported"
        )
    return {
        "architectures": [f"{family.name}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": model.norm_eps,
        # Read by transformers before 5, and by vLLM; the next one by transformers 5.
        "rope_theta": model.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "tie_word_embeddings": model.tie_embeddings,
        "use_sliding_window": False,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _described() -> str:
    """Describe the layers of all families in one line."""
    return ", ".join(
        f"{family.name}: qk_norm={_lower(family.qk_norm)} qkv_bias={_lower(family.qkv_bias)}"
        for family in FAMILIES.values()
    )


def _lower(value: bool) -> str:
    return str(value).lower()
