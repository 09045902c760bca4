"""What the factors of any kind of layer have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from proma_megatron.projection.factors.contraction import (
    Products,
    Rows,
)

Part = tuple[Rows, torch.Tensor]  # rows of a unit, and its coefficients (k,) float64


class Factors(Protocol):
    """The sequence gradients of one weight or table in one microbatch."""

    @property
    def nbytes(self) -> int:
        """What they hold, the workspace apart."""
        ...

    def products(
        self, units: Sequence[Rows], accumulated: torch.Tensor | None = None
    ) -> list[Products]:
        """Return those of every unit, of this rank's entries; without ``accumulated`` K alone."""
        ...

    def update(self, parts: Sequence[Part], accumulated: torch.Tensor) -> None:
        """Add ``sum_s coefficients_s G_s[rows]`` to ``accumulated[rows]`` for every part."""
        ...
