"""Which entries of the full model a rank holds of each parameter."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

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
