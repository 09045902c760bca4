"""ISOPO's rules at work: kernel and norm."""

from __future__ import annotations

import torch

from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.distributed.topology import Axis
from proma_megatron.projection.rules.isopo import Kind, precondition
from proma_megatron.projection.rules.proma import Solution
from proma_megatron.projection.updaters.coefficients import CoefficientUpdater


class IsopoUpdater(CoefficientUpdater):
    """Adds microbatches with advantages that each unit's K has transformed.

    Args:
        dtype: the compute dtype, as for the other updaters; of no matter for this rule.
    """

    def __init__(self, config: ProjectionConfig, tensor: Axis, dtype: torch.dtype) -> None:
        super().__init__(tensor)
        assert config.rule in ("kernel", "norm")
        self.kind: Kind = config.rule
        self.regularization = config.regularization

    def solve(
        self, gram: torch.Tensor, overlap: torch.Tensor | None, advantages: torch.Tensor
    ) -> Solution:
        return precondition(self.kind, gram, advantages, regularization=self.regularization)
