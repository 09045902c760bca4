"""The parameters of each pipeline stage, from the table of `policy/parameters.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from proma_megatron.config.constants import DTYPE_BYTES
from proma_megatron.config.run import RunConfig
from proma_megatron.weights.mapping import tensor_shapes
from proma_megatron.weights.qwen import LAYER, MODEL, TIED_HEAD
from proma_megatron.weights.shards import Row, Share

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_PROJ = "self_attention.linear_proj.weight"


@dataclass(frozen=True)
class Precision:
    """Bytes of one number, by its use."""

    compute: int  # weights and activations
    wide: int  # norms' input and the loss: float32 or better
    gradient: int  # main gradients
    state: int  # each of Adam's two moments
    master: int  # the optimizer's own weights; 0: it updates the model's

    @classmethod
    def of(cls, dtype: str) -> Precision:
        size = DTYPE_BYTES[dtype]
        wide = max(size, 4)
        return cls(size, wide, wide, wide, 4 if dtype == "bfloat16" else 0)


@dataclass(frozen=True)
class Local:
    """One parameter as a rank holds it."""

    name: str  # Megatron's, without the layer
    shape: tuple[int, ...]
    row: Row
    layer: int | None
    lengths: tuple[int, ...]  # rows of the whole parameter by Hugging Face tensor
    # Embedding and head of a tied model over stages: Megatron gives it a bucket of its own.
    shared: bool = False

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def is_linear(self) -> bool:
        """A layer's matrix: no norm, no bias, no vocabulary."""
        return self.layer is not None and len(self.shape) == 2


@dataclass(frozen=True)
class Stage:
    """One pipeline stage: every one of its ranks holds parameters of these shapes."""

    index: int
    chunks: tuple[tuple[Local, ...], ...]  # in Megatron's order; one a virtual stage
    layers_per_chunk: int
    first: bool
    last: bool

    @property
    def layers(self) -> int:
        return self.layers_per_chunk * len(self.chunks)

    @property
    def parameters(self) -> tuple[Local, ...]:
        return tuple(found for chunk in self.chunks for found in chunk)

    def find(self, name: str) -> Local | None:
        return next((found for found in self.parameters if found.name == name), None)


def stages(config: RunConfig, vocab_size: int) -> tuple[Stage, ...]:
    """Return every pipeline stage of the layout.

    Layers are dealt out in equal runs: chunk c of stage s holds run ``c * stages + s``.
    """
    parallel = config.parallel
    pipeline, virtual = parallel.pipeline, parallel.virtual_pipeline or 1
    per_chunk = config.model.layers // (pipeline * virtual)
    found = []
    for stage in range(pipeline):
        chunks = []
        for chunk in range(virtual):
            start = (chunk * pipeline + stage) * per_chunk
            chunks.append(
                _chunk(
                    config,
                    vocab_size,
                    range(start, start + per_chunk),
                    first=stage == 0 and chunk == 0,
                    last=stage == pipeline - 1 and chunk == virtual - 1,
                )
            )
        found.append(Stage(stage, tuple(chunks), per_chunk, stage == 0, stage == pipeline - 1))
    return tuple(found)


def _chunk(
    config: RunConfig, vocab_size: int, layers: range, *, first: bool, last: bool
) -> tuple[Local, ...]:
    model, tp = config.model, config.parallel.tensor
    shapes = tensor_shapes(model, -(-vocab_size // tp) * tp)
    over_stages = model.tie_embeddings and config.parallel.pipeline > 1

    def local(name: str, row: Row, prefix: str = "", layer: int | None = None) -> Local:
        tensors = [shapes[prefix + tensor] for tensor in row.tensors]
        shape = list(tensors[0])
        shape[row.axis] = sum(tensor[row.axis] for tensor in tensors)
        if row.share is Share.ENTRIES:
            shape[row.axis] //= tp
        shared = over_stages and name in (EMBEDDING, HEAD)
        lengths = tuple(tensor[0] for tensor in tensors)
        return Local(name, tuple(shape), row, layer, lengths, shared)

    found = [local(EMBEDDING, MODEL[EMBEDDING])] if first else []
    for layer in layers:
        prefix = f"model.layers.{layer}."
        rows = {n: r for n, r in LAYER.items() if prefix + r.tensors[0] in shapes}
        # Megatron builds the output projection before the others of the attention.
        order = sorted(rows, key=lambda name: (name != "input_layernorm.weight", name != _PROJ))
        found += [local(name, rows[name], prefix, layer) for name in order]
    if last:
        norm = "decoder.final_layernorm.weight"
        found.append(local(norm, MODEL[norm]))
        if not model.tie_embeddings:
            found.append(local(HEAD, MODEL[HEAD]))
        elif over_stages:
            found.append(local(HEAD, TIED_HEAD))
    return tuple(found)


def total_parameters(config: RunConfig, vocab_size: int) -> int:
    """Count entries of the unsharded model, a tied table once and no padding."""
    return sum(math.prod(shape) for shape in tensor_shapes(config.model, vocab_size).values())
