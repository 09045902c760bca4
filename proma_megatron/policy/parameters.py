"""Which entries of which Hugging Face tensors a rank holds, for every local parameter.

Hugging Face names are the unsharded truth: units of the projection, initialization, gathering and
checkpoints all speak them. Megatron fuses q, k, v and gate, up, and cuts along one axis; a
`ParameterShard` says how, as a list of runs along that axis.

| Megatron parameter                  | Hugging Face tensors                 | cut along          |
|-------------------------------------|--------------------------------------|--------------------|
| embedding.word_embeddings.weight    | model.embed_tokens.weight            | rows (vocabulary)  |
| ...self_attention.linear_qkv.weight | q_proj, k_proj, v_proj .weight       | rows, by KV group  |
| ...self_attention.linear_qkv.bias   | q_proj, k_proj, v_proj .bias         | rows, by KV group  |
| ...self_attention.linear_proj.weight| o_proj.weight                        | columns            |
| ...self_attention.q_layernorm.weight| q_norm.weight (k_norm alike)         | not cut, partial   |
| ...mlp.linear_fc1.weight            | gate_proj, up_proj .weight           | rows, by rank      |
| ...mlp.linear_fc2.weight            | down_proj.weight                     | columns            |
| ...input_layernorm.weight           | input_layernorm.weight               | not cut            |
| ...pre_mlp_layernorm.weight         | post_attention_layernorm.weight      | not cut            |
| decoder.final_layernorm.weight      | model.norm.weight                    | not cut            |
| output_layer.weight                 | lm_head.weight (tied: embed_tokens)  | rows (vocabulary)  |
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from proma_megatron.config import ModelConfig

if TYPE_CHECKING:  # the launcher reads the table without loading Megatron
    from proma_megatron.topology import Topology

GATHERED_TOGETHER = 2**26  # entries


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


def parameter_shards(
    chunk: torch.nn.Module, model: ModelConfig, vocab_size: int, topology: Topology
) -> list[ParameterShard]:
    """The shards of a bare model chunk, in the order of its parameters.

    Raises:
        ValueError: a parameter that the table above does not know.
    """
    return [
        _shard(_global_name(name, chunk), parameter, model, vocab_size, topology)
        for name, parameter in chunk.named_parameters()
    ]


def _global_name(name: str, chunk: torch.nn.Module) -> str:
    """Megatron counts layers within a chunk; the model counts them from its first."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
    if match is None:
        return name
    decoder: Any = chunk.decoder
    number = decoder.layers[int(match[1])].layer_number - 1
    return f"decoder.layers.{number}.{match[2]}"


@dataclass(frozen=True)
class _Block:
    """``length`` entries of a Hugging Face tensor, in the order of Megatron's fused axis."""

    tensor: str
    start: int
    length: int


def _qkv_blocks(prefix: str, kind: str, model: ModelConfig) -> list[_Block]:
    """Fused rows: for each KV group its query heads, then its key head, then its value head."""
    per_group = model.heads // model.kv_heads * model.head_dim
    blocks = []
    for group in range(model.kv_heads):
        blocks += [
            _Block(f"{prefix}.q_proj.{kind}", group * per_group, per_group),
            _Block(f"{prefix}.k_proj.{kind}", group * model.head_dim, model.head_dim),
            _Block(f"{prefix}.v_proj.{kind}", group * model.head_dim, model.head_dim),
        ]
    return blocks


def _gate_up_blocks(prefix: str, model: ModelConfig, tp: int) -> list[_Block]:
    """Fused rows: for each rank its part of gate, then its part of up."""
    part = model.ffn_hidden_size // tp
    return [
        _Block(f"{prefix}.{which}_proj.weight", rank * part, part)
        for rank in range(tp)
        for which in ("gate", "up")
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


def _shard(
    name: str,
    parameter: torch.nn.Parameter,
    model: ModelConfig,
    vocab_size: int,
    topology: Topology,
) -> ParameterShard:
    rank, tp = topology.tensor.rank, topology.tensor.size

    def make(
        blocks: list[_Block], axis: int, reduction: Reduction, *, linear: bool = False
    ) -> ParameterShard:
        length = parameter.shape[axis]
        start = rank * length if reduction is Reduction.DISJOINT else 0
        layer_match = re.match(r"decoder\.layers\.(\d+)\.", name)
        return ParameterShard(
            name=name,
            parameter=parameter,
            axis=axis,
            runs=_cut(blocks, start, length),
            reduction=reduction if tp > 1 else Reduction.REPLICATED,
            layer=int(layer_match[1]) if layer_match else None,
            linear=linear,
        )

    def whole(tensor: str, *, per_head: bool = False) -> ParameterShard:
        # q/k norms see this rank's heads only; other norms see this rank's tokens under
        # sequence parallelism.
        partial = per_head or topology.sequence_parallel
        reduction = Reduction.PARTIAL if partial else Reduction.REPLICATED
        return make([_Block(tensor, 0, parameter.shape[0])], 0, reduction)

    vocabulary = "model.embed_tokens.weight"
    head = vocabulary if model.tie_embeddings else "lm_head.weight"
    if name == "embedding.word_embeddings.weight":
        # Under tied embeddings Hugging Face's lm_head shares the tensor; it is still no Linear.
        return make([_Block(vocabulary, 0, vocab_size)], 0, Reduction.DISJOINT)
    if name == "output_layer.weight":
        linear = not model.tie_embeddings
        return make([_Block(head, 0, vocab_size)], 0, Reduction.DISJOINT, linear=linear)
    if name == "decoder.final_layernorm.weight":
        return whole("model.norm.weight")
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
    if match is None:
        raise ValueError(f"parameter {name} has no Hugging Face counterpart in parameters.py")
    prefix = f"model.layers.{match[1]}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    disjoint = Reduction.DISJOINT
    table: dict[str, Callable[[], ParameterShard]] = {
        "self_attention.linear_qkv.weight": lambda: make(
            _qkv_blocks(attention, "weight", model), 0, disjoint, linear=True
        ),
        "self_attention.linear_qkv.bias": lambda: make(
            _qkv_blocks(attention, "bias", model), 0, disjoint
        ),
        "self_attention.linear_proj.weight": lambda: make(
            [_Block(f"{attention}.o_proj.weight", 0, model.heads * model.head_dim)],
            1,
            disjoint,
            linear=True,
        ),
        "self_attention.q_layernorm.weight": lambda: whole(
            f"{attention}.q_norm.weight", per_head=True
        ),
        "self_attention.k_layernorm.weight": lambda: whole(
            f"{attention}.k_norm.weight", per_head=True
        ),
        "mlp.linear_fc1.weight": lambda: make(
            _gate_up_blocks(mlp, model, tp), 0, disjoint, linear=True
        ),
        "mlp.linear_fc2.weight": lambda: make(
            [_Block(f"{mlp}.down_proj.weight", 0, model.ffn_hidden_size)],
            1,
            disjoint,
            linear=True,
        ),
        "input_layernorm.weight": lambda: whole(f"{prefix}.input_layernorm.weight"),
        "pre_mlp_layernorm.weight": lambda: whole(f"{prefix}.post_attention_layernorm.weight"),
    }
    if match[2] not in table:
        raise ValueError(f"parameter {name} has no Hugging Face counterpart in parameters.py")
    return table[match[2]]()


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


# --------------------------------------------------------------------------- filling and reading


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


def gather(
    shards: Iterable[ParameterShard],
    read: Callable[[ParameterShard], torch.Tensor],
    model: ModelConfig,
    vocab_size: int,
    topology: Topology,
) -> dict[str, torch.Tensor]:
    """Unsharded tensors by Hugging Face name on the CPU of global rank 0; empty elsewhere.

    ``read(shard)`` gives the local value: the parameter, its gradient, or an optimizer state of its
    shape. Only ranks of the first data-parallel replica contribute.
    """
    shapes = tensor_shapes(model, vocab_size)
    mine: dict[str, list[tuple[int, int, torch.Tensor]]] = {}
    if topology.data.rank == 0:
        for shard in shards:
            if shard.reduction is not Reduction.DISJOINT and topology.tensor.rank > 0:
                continue
            value = read(shard).detach()
            for run in shard.runs:
                if run.length:
                    part = value.narrow(shard.axis, run.local, run.length)
                    mine.setdefault(run.tensor, []).append((shard.axis, run.start, part))
    full: dict[str, torch.Tensor] = {}
    for names in _in_groups(shapes):
        local = [
            # A copy: pickling a view would send the whole buffer that it looks into.
            (name, axis, start, part.to("cpu", copy=True).contiguous())
            for name in names
            for axis, start, part in mine.get(name, ())
        ]
        pieces: list[Any] | None = [None] * topology.world_size if topology.is_main else None
        dist.gather_object(local, pieces, dst=0)
        for name, axis, start, part in (item for rank in pieces or () for item in rank):
            if name not in full:
                full[name] = torch.full(shapes[name], torch.nan, dtype=part.dtype)
            full[name].narrow(axis, start, part.shape[axis]).copy_(part)
    return full


def _in_groups(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names of tensors that are gathered together: what is in passing stays small."""
    group: list[str] = []
    entries = 0
    for name, shape in shapes.items():
        group.append(name)
        entries += math.prod(shape)
        if entries >= GATHERED_TOGETHER:
            yield group
            group, entries = [], 0
    if group:
        yield group
