"""Bytes that weight gradients take before they are in ``main_grad``.

Without the projection that is one parameter's gradient at a time. With it, the accumulator holds
the factors x and dY of a transformer layer's weights, in the main gradients' dtype, until the
layer is solved, and materialized sequence gradients G up to half of ``projection.workspace_mb``.
Solving passes over what did not fit in blocks (two exist while one replaces the other), and squares
a unit's main gradient in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from proma_megatron.config import RunConfig
from proma_megatron.planning.shapes import Local
from proma_megatron.planning.sizes import Sizes
from proma_megatron.policy.parameters import Fusion


@dataclass
class Group:
    """Captures that are solved together; weights enter in the order of the backward pass."""

    sizes: Sizes
    config: RunConfig
    projects: bool  # a later microbatch than the first: something can be removed
    held: int = 0  # bytes of factors
    materialized: int = 0
    solving: int = field(default=0)  # the largest temporary of the solve

    def add(self, weight: Local, *, lookup: bool = False) -> None:
        """The gradient of a weight (out, in), plus that of a lookup in the same table."""
        sizes, grad = self.sizes, self.sizes.precision.gradient
        rows, width = weight.shape
        self.held += sizes.tokens * (rows + width * (2 if lookup else 1)) * grad
        unit_rows, range_rows = _rows(weight, self.config, sizes.tensor)
        unit = range_rows * width
        if not (self.projects and is_projected(weight, self.config)):
            self._temporary(sizes.tokens * range_rows * grad)  # dY with scaled rows
            return
        self._temporary(16 * unit if grad < 8 else 8 * unit)  # main_grad.double().square()
        size = sizes.sequences * weight.count * grad
        if self.materialized + size <= self.budget:
            self.materialized += size
            self._temporary(unit * grad)  # the combination of G that is added
            return
        row = sizes.sequences * width * grad
        block = max(1, self.budget // row)
        blocks = 1 if unit_rows <= block else 2
        self._temporary(blocks * min(block, range_rows) * row)
        self._temporary(sizes.tokens * range_rows * grad)

    def _temporary(self, size: int) -> None:
        self.solving = max(self.solving, size)

    @property
    def budget(self) -> int:
        """Half of the workspace is for G that is kept, half for blocks in passing."""
        return int(self.config.projection.workspace_mb * 2**20 // 2)

    @property
    def pending(self) -> int:
        """Held from the captures to the solve."""
        return self.held + self.materialized

    @property
    def peak(self) -> int:
        return self.pending + self.solving


def is_projected(parameter: Local, config: RunConfig) -> bool:
    """Whether something may be removed from this parameter's gradient; see `units_of`."""
    return config.projection.parameters == "all" or parameter.row.linear


def _rows(weight: Local, config: RunConfig, tensor: int) -> tuple[int, int]:
    """Local rows of the largest unit of a weight, and of its largest run of adjacent rows."""
    rows = weight.shape[0]
    if weight.row.axis != 0 or weight.row.fusion is Fusion.NONE:
        return rows, rows
    if config.projection.unit == "megatron":
        return rows, rows
    unit = min(rows, max(weight.lengths) // min(tensor, config.model.kv_heads))
    if weight.row.fusion is Fusion.RANK:
        unit = max(weight.lengths) // tensor
        return unit, unit
    run = max(weight.lengths) // config.model.kv_heads
    return unit, min(rows, run)


def lookup_workspace(sizes: Sizes, table: Local, budget: int, *, projects: bool) -> int:
    """An untied embedding's: dY, and the rows that its tokens use, by sequence."""
    grad = sizes.precision.gradient
    held = sizes.tokens * sizes.hidden * grad
    scaled = 2 * held  # dY of the tokens, scaled
    if not projects:
        return held + scaled
    row = sizes.sequences * sizes.hidden * grad
    used = min(sizes.tokens, table.shape[0])
    block = max(1, budget // row)
    blocks = 1 if used <= block else 2
    energy = table.count * (16 if grad < 8 else 8)
    return held + max(blocks * min(block, used) * row + held, scaled, energy)
