"""What is projected together: the units of the policy's parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from proma_megatron.weights.shards import ParameterShard, Reduction


@dataclass(frozen=True)
class Unit:
    """A set of entries with one Gram matrix and one projection.

    ``rows`` are half-open ranges of the local parameter's first axis. They may be empty on a rank
    that holds nothing of the unit (few KV heads over many tensor ranks); the rank still takes part
    in the reduction.
    """

    name: str
    shard: ParameterShard
    rows: tuple[tuple[int, int], ...]
    projected: bool  # False: accumulated as Megatron would, P = G a and nothing removed

    @property
    def reduction(self) -> Reduction:
        return self.shard.reduction


def units_of(
    shard: ParameterShard,
    unit: Literal["huggingface", "megatron"],
    parameters: Literal["all", "linear"],
) -> tuple[Unit, ...]:
    """Return the units of one parameter.

    Args:
        unit: "huggingface" gives q, k, v, gate and up units of their own; "megatron" takes a fused
            weight as one unit.
        parameters: "linear" projects only what is an ``nn.Linear`` weight in Hugging Face's model
            (the published code's choice); a table tied to the head is an embedding here.
    """
    projected = parameters == "all" or shard.linear
    everything = ((0, shard.parameter.shape[0]),)
    # What is not fused keeps its Hugging Face name, which is the same in every layout.
    if len(shard.tensors) == 1:
        # Vocabulary padding has no gradient, so taking all rows changes nothing.
        return (Unit(shard.tensors[0], shard, everything, projected),)
    if unit == "megatron":
        return (Unit(shard.name, shard, everything, projected),)
    return tuple(
        Unit(
            name=tensor,
            shard=shard,
            rows=tuple(
                (run.local, run.local + run.length)
                for run in shard.runs
                if run.tensor == tensor and run.length
            ),
            projected=projected,
        )
        for tensor in shard.tensors
    )


def check_claims(shards: Iterable[ParameterShard], layers: Iterable[torch.nn.Module]) -> None:
    """Check that every trainable parameter belongs to a layer that hands over its gradient.

    Raises:
        ValueError: one doesn't; what Megatron accumulates of it would know no advantages.
    """
    claimed = {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}
    for shard in shards:
        if shard.parameter.requires_grad and id(shard.parameter) not in claimed:
            raise ValueError(
                f"no capturing layer claims the trainable parameter {shard.name}; it would be "
                "trained as if every advantage were 1"
            )


_LAYER = re.compile(r"^(?:model|decoder)\.(?:layers\.(\d+)\.)?")


def kind_of(name: str) -> str:
    """Return what a unit or tensor is, without its layer: ``self_attn.q_proj.weight``."""
    return _LAYER.sub("", name)


def layer_of(name: str) -> int | None:
    """Return the layer of a unit or tensor; None for embedding, final norm and head."""
    match = _LAYER.match(name)
    return int(match[1]) if match and match[1] else None
