"""Which entries of which Hugging Face tensors a rank holds, for every local parameter.

Hugging Face names are the unsharded truth: units of the projection, initialization, gathering and
checkpoints all speak them. Megatron fuses q, k, v and gate, up, and cuts along one axis: `MODEL`
and `LAYER` below say how, and a `ParameterShard` holds what follows for one rank, as a list of runs
along the cut axis.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from proma_megatron.config.model import ModelConfig
from proma_megatron.weights.qwen import LAYER, MODEL, TIED_HEAD
from proma_megatron.weights.shards import Fusion, ParameterShard, Row, Run, Share

if TYPE_CHECKING:  # the launcher reads shapes without loading Megatron
    import torch

    from proma_megatron.distributed.topology import Topology


def parameter_shards(
    chunk: torch.nn.Module, model: ModelConfig, vocab_size: int, topology: Topology
) -> list[ParameterShard]:
    """Return the shards of a bare model chunk, in the order of its parameters.

    Raises:
        ValueError: a parameter that the table above does not know, or the configuration denies.
    """
    shapes = tensor_shapes(model, vocab_size)
    shards = []
    for local_name, parameter in chunk.named_parameters():
        name, layer, row = _look_up(local_name, chunk, model)
        for tensor in row.tensors:
            if tensor not in shapes:
                raise ValueError(f"parameter {name} holds {tensor}, which this model doesn't have")
        reduction = row.share.reduction(topology)
        length = parameter.shape[row.axis]
        start = topology.tensor.rank * length if row.share is Share.ENTRIES else 0
        shards.append(
            ParameterShard(
                name=name,
                parameter=parameter,
                axis=row.axis,
                runs=_cut(_blocks(row, shapes, model, topology.tensor.size), start, length),
                reduction=reduction,
                layer=layer,
                linear=row.linear,
            )
        )
    return shards


def _look_up(name: str, chunk: torch.nn.Module, model: ModelConfig) -> tuple[str, int | None, Row]:
    """Return the parameter's name and layer in the whole model, and its row with complete names."""
    if name == "output_layer.weight" and model.tie_embeddings:
        return name, None, TIED_HEAD
    if name in MODEL:
        return name, None, MODEL[name]
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
    rest = match[2] if match else ""
    layer = None
    if match is not None:
        # Megatron counts layers within a chunk; the model counts them from its first.
        decoder: Any = chunk.decoder
        layer = int(decoder.layers[int(match[1])].layer_number) - 1
        name = f"decoder.layers.{layer}.{rest}"
    if rest not in LAYER:
        raise ValueError(f"parameter {name} has no Hugging Face counterpart in parameters.py")
    tensors = tuple(f"model.layers.{layer}.{tensor}" for tensor in LAYER[rest].tensors)
    return name, layer, replace(LAYER[rest], tensors=tensors)


@dataclass(frozen=True)
class _Block:
    """``length`` entries of a Hugging Face tensor, in the order of Megatron's axis."""

    tensor: str
    start: int
    length: int


def _blocks(
    row: Row, shapes: Mapping[str, tuple[int, ...]], model: ModelConfig, tp: int
) -> list[_Block]:
    """Return what the whole, unsharded parameter holds along its cut axis, end to end."""
    parts = {Fusion.NONE: 1, Fusion.KV_GROUP: model.kv_heads, Fusion.RANK: tp}[row.fusion]
    lengths = {tensor: shapes[tensor][row.axis] // parts for tensor in row.tensors}
    return [
        _Block(tensor, part * length, length)
        for part in range(parts)
        for tensor, length in lengths.items()
    ]


def _cut(blocks: Iterable[_Block], start: int, length: int) -> tuple[Run, ...]:
    """Return the runs of ``blocks``, laid end to end, that fall into [start, start + length).

    Tensors with nothing in the window keep a run of length 0: every rank must know every unit,
    or the ranks would disagree about what is reduced.
    """
    runs: dict[str, list[Run]] = {}
    at = 0
    for block in blocks:
        low, high = max(at, start), min(at + block.length, start + length)
        found = runs.setdefault(block.tensor, [])
        if low < high:
            found.append(Run(block.tensor, block.start + low - at, low - start, high - low))
        at += block.length
    return tuple(run for tensor, found in runs.items() for run in (found or [Run(tensor, 0, 0, 0)]))


def tensor_shapes(model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return every Hugging Face tensor of the model with its unsharded shape."""
    hidden, ffn, dim = model.hidden_size, model.ffn_hidden_size, model.head_dim
    rows = {"q": model.heads * dim, "k": model.kv_heads * dim, "v": model.kv_heads * dim}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab_size, hidden)}
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        for which, count in rows.items():
            shapes[f"{prefix}.self_attn.{which}_proj.weight"] = (count, hidden)
            if model.qkv_bias:
                shapes[f"{prefix}.self_attn.{which}_proj.bias"] = (count,)
        if model.qk_norm:
            shapes[f"{prefix}.self_attn.q_norm.weight"] = (dim,)
            shapes[f"{prefix}.self_attn.k_norm.weight"] = (dim,)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, model.heads * dim)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (ffn, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, ffn)
    shapes["model.norm.weight"] = (hidden,)
    if not model.tie_embeddings:
        shapes["lm_head.weight"] = (vocab_size, hidden)
    return shapes


# --------------------------------------------------------------------------- filling
