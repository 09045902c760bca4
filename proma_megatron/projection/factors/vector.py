"""Sequence gradients of vectors: biases and norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from proma_megatron.projection.factors.base import Part
from proma_megatron.projection.factors.contraction import (
    Rows,
)


class VectorFactors:
    """Norm weights and biases: G^T (k, n) is small, kept, and projected as it is."""

    def __init__(self, gradients: torch.Tensor) -> None:
        self.gradients = gradients  # (k, n) in the accumulation dtype

    @property
    def nbytes(self) -> int:
        return self.gradients.nbytes

    def update(self, parts: Sequence[Part], accumulated: torch.Tensor) -> None:
        for rows, coefficients in parts:
            for start, stop in rows:
                part = coefficients @ self.gradients[:, start:stop].double()
                accumulated[start:stop] += part.to(accumulated.dtype)


def take(matrix: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Return the columns of ``matrix`` (k, n) that a unit's rows name, side by side."""
    return torch.cat([matrix[:, start:stop] for start, stop in rows] or [matrix[:, :0]], dim=1)
