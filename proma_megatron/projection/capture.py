"""What one layer hands over of one microbatch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from proma_megatron.projection.factors.base import Factors
from proma_megatron.projection.factors.vector import VectorFactors
from proma_megatron.projection.units import Unit
from proma_megatron.weights.shards import ParameterShard


@dataclass(frozen=True)
class Capture:
    """The sequence gradients of one parameter in one microbatch."""

    shard: ParameterShard
    units: tuple[Unit, ...]
    factors: Factors | VectorFactors
    first: bool  # nothing has been accumulated yet

    @property
    def main_grad(self) -> torch.Tensor:
        return self.shard.parameter.main_grad  # type: ignore[attr-defined]
