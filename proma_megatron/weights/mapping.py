"""Which entries of which Hugging Face tensors a rank holds, for every local parameter.

Hugging Face names are the unsharded truth: units of the projection, initialization, gathering and
checkpoints all speak them. Megatron fuses q, k, v and gate, up, and cuts along one axis: `MODEL`
and `LAYER` below say how, and a `ParameterShard` holds what follows for one rank, as a list of runs
along the cut axis.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

import torch

from proma_megatron.config.sections import ModelConfig

if TYPE_CHECKING:  # the launcher reads shapes without loading Megatron
    from proma_megatron.distributed.topology import Topology


class Reduction(Enum):
    """What a rank's gradient is, seen over the tensor-parallel group."""

    DISJOINT = "disjoint"  # a slice of its own
    REPLICATED = "replicated"  # the whole, the same on every rank
    PARTIAL = "partial"  # a summand: Megatron adds it over TP in finalize_model_grads


@dataclass(frozen=True)
class Run:
    """``length`` consecutive entries along the cut axis of one Hugging Face tensor."""

    tensor: str  # Hugging Face name
    start: int  # in the Hugging Face tensor
    local: int  # in the local parameter
    length: int


@dataclass(frozen=True)
class ParameterShard:
    """One local parameter of this rank."""

    name: str  # Megatron's name with the layer counted from the model's first
    parameter: torch.nn.Parameter
    axis: int
    runs: tuple[Run, ...]
    reduction: Reduction
    layer: int | None  # None for embedding, final norm and head
    linear: bool  # an nn.Linear weight in the Hugging Face model

    @property
    def tensors(self) -> tuple[str, ...]:
        """Hugging Face tensors of the whole fused parameter, also those with no entry here."""
        return tuple(dict.fromkeys(run.tensor for run in self.runs))


class Share(Enum):
    """Which part of a parameter's gradient a tensor-parallel rank computes."""

    ENTRIES = "entries"  # some rows or columns
    HEADS = "heads"  # that of its own attention heads, for every entry
    TOKENS = "tokens"  # that of its own tokens under sequence parallelism; else of all tokens

    def reduction(self, topology: Topology) -> Reduction:
        if topology.tensor.size == 1:
            return Reduction.REPLICATED
        if self is Share.ENTRIES:
            return Reduction.DISJOINT
        if self is Share.HEADS or topology.sequence_parallel:
            return Reduction.PARTIAL
        return Reduction.REPLICATED


class Fusion(Enum):
    """The order of entries where several Hugging Face tensors make one parameter."""

    NONE = "none"
    KV_GROUP = "kv_group"  # for each KV group: its query heads, its key head, its value head
    RANK = "rank"  # for each rank: its part of each tensor


@dataclass(frozen=True)
class Row:
    """One line of the table: what one Megatron parameter is made of."""

    tensors: tuple[str, ...]
    axis: int = 0  # that is cut
    share: Share = Share.ENTRIES
    fusion: Fusion = Fusion.NONE
    linear: bool = False  # an nn.Linear weight in the Hugging Face model


# Hugging Face's lm_head shares the embedding's tensor where they are tied, and Megatron's last
# pipeline stage holds a copy of it; it counts as no Linear then.
TIED_HEAD = Row(("model.embed_tokens.weight",))
MODEL = {
    "embedding.word_embeddings.weight": Row(("model.embed_tokens.weight",)),
    "decoder.final_layernorm.weight": Row(("model.norm.weight",), share=Share.TOKENS),
    "output_layer.weight": Row(("lm_head.weight",), linear=True),
}
# Names on both sides go on from "decoder.layers.N." and "model.layers.N.".
LAYER = {
    "input_layernorm.weight": Row(("input_layernorm.weight",), share=Share.TOKENS),
    "self_attention.linear_qkv.weight": Row(
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        fusion=Fusion.KV_GROUP,
        linear=True,
    ),
    "self_attention.linear_qkv.bias": Row(
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        fusion=Fusion.KV_GROUP,
    ),
    "self_attention.q_layernorm.weight": Row(("self_attn.q_norm.weight",), share=Share.HEADS),
    "self_attention.k_layernorm.weight": Row(("self_attn.k_norm.weight",), share=Share.HEADS),
    "self_attention.linear_proj.weight": Row(("self_attn.o_proj.weight",), axis=1, linear=True),
    "pre_mlp_layernorm.weight": Row(("post_attention_layernorm.weight",), share=Share.TOKENS),
    "mlp.linear_fc1.weight": Row(
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"), fusion=Fusion.RANK, linear=True
    ),
    "mlp.linear_fc2.weight": Row(("mlp.down_proj.weight",), axis=1, linear=True),
}


def parameter_shards(
    chunk: torch.nn.Module, model: ModelConfig, vocab_size: int, topology: Topology
) -> list[ParameterShard]:
    """The shards of a bare model chunk, in the order of its parameters.

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
    """The parameter's name and layer in the whole model, and its row with complete names."""
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
    """What the whole, unsharded parameter holds along its cut axis, end to end."""
    parts = {Fusion.NONE: 1, Fusion.KV_GROUP: model.kv_heads, Fusion.RANK: tp}[row.fusion]
    lengths = {tensor: shapes[tensor][row.axis] // parts for tensor in row.tensors}
    return [
        _Block(tensor, part * length, length)
        for part in range(parts)
        for tensor, length in lengths.items()
    ]


def _cut(blocks: Iterable[_Block], start: int, length: int) -> tuple[Run, ...]:
    """The runs of ``blocks``, laid end to end, that fall into [start, start + length).

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
    """Every Hugging Face tensor of the model with its unsharded shape."""
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


class Narrowable(Protocol):
    """A tensor, or what reads slices of one from a file."""

    def narrow(self, axis: int, start: int, length: int, /) -> torch.Tensor: ...


def fill(shards: Iterable[ParameterShard], read: Callable[[str], Narrowable]) -> None:
    """Copy slices of Hugging Face tensors into local parameters; padding rows become 0.

    ``read(name)`` gives one tensor; it is called for one tensor at a time, and only for those of
    which this rank holds a part.
    """
    with torch.no_grad():
        for shard in shards:
            if sum(run.length for run in shard.runs) < shard.parameter.shape[shard.axis]:
                shard.parameter.zero_()  # vocabulary padding
            for tensor in shard.tensors:
                if not any(run.tensor == tensor and run.length for run in shard.runs):
                    continue
                value = read(tensor)
                for run in shard.runs:
                    if run.tensor == tensor and run.length:
                        source = value.narrow(shard.axis, run.start, run.length)
                        shard.parameter.narrow(shard.axis, run.local, run.length).copy_(source)


def initialize(
    chunk: torch.nn.Module, model: ModelConfig, vocab_size: int, topology: Topology, seed: int
) -> None:
    """Random weights, a function of (seed, Hugging Face name) alone and so alike in every layout.

    Normal with ``init_std``, scaled by 1/sqrt(2 * layers) for the two projections that write into
    the residual stream, as GPT-2 does; norms 1, biases 0.
    """
    shapes = tensor_shapes(model, vocab_size)

    def read(name: str) -> torch.Tensor:
        shape = shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        if name.endswith(".bias"):
            return torch.zeros(shape)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = model.init_std / (2 * model.layers) ** 0.5 if residual else model.init_std
        return torch.randn(shape, generator=generator) * std

    fill(parameter_shards(chunk, model, vocab_size, topology), read)
