"""Bytes that weight gradients take before they are in ``main_grad``.

Without the projection that is one parameter's gradient at a time. With it, the accumulator holds
the factors x and dY of a transformer layer's weights, in the main gradients' dtype, until the
layer is solved, and materialized sequence gradients G up to half of ``projection.workspace_mb``.
Solving passes over what did not fit in blocks (two exist while one replaces the other), and squares
a unit's main gradient in float64.

ISOPO forms G on the first microbatch as well, and squares nothing. Intra-PROMA forms no G of single
sequences: it has matrices of T rows in float64 for each X and dY of the group, and the unit's
gradient in blocks. What a factorization needs inside is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from proma_megatron.config import RunConfig
from proma_megatron.planning.shapes import Local
from proma_megatron.planning.sizes import Sizes
from proma_megatron.policy.parameters import Fusion
from proma_megatron.projection.subspace import is_direct, sketch_width


@dataclass
class Group:
    """Captures that are solved together; weights enter in the order of the backward pass."""

    sizes: Sizes
    config: RunConfig
    projects: bool  # the rule acts on this microbatch; PROMA's do not on the first
    held: int = 0  # bytes of factors
    materialized: int = 0
    solving: int = field(default=0)  # the largest temporary of the solve
    finding: int = 0  # Intra-PROMA: what all subspaces take together while they are sought,
    finding_block: int = 0  # with a block in passing,
    found: int = 0  # and after

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
        if self.config.projection.rule == "subspace":
            self._add_subspaces(weight, range_rows)
            return
        if not self.config.projection.acts_alone:
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

    def _add_subspaces(self, weight: Local, range_rows: int) -> None:
        """Those of X and of every unit's dY, and the gradient that is formed in blocks."""
        tokens, grad = self.sizes.tokens, self.sizes.precision.gradient
        rows, width = weight.shape
        rank = self.config.projection.rank
        units = len(weight.row.tensors) if self.config.projection.unit == "huggingface" else 1
        carried = sketch_width(rank)
        if is_direct(tokens, rank):  # Gram matrices and their eigenvectors
            self.finding += 8 * (1 + units) * 2 * tokens * tokens
        else:  # parts, their sum and a stack of them; what a factorization returns
            self.finding += 8 * ((1 + units) * 4 * tokens * carried + (rows + width) * carried)
        if grad < 8:  # a block of X or dY in float64
            most = 8 * tokens * max(range_rows, width)
            self.finding_block = max(self.finding_block, min(self.budget, most))
        # Bases, images, and the removed part's left factor.
        self.found += 8 * rank * (2 * rows + width + (1 + units) * tokens)
        block = min(range_rows, max(1, self.budget // (max(tokens, width) * grad)))
        blocks = 1 if range_rows <= block else 2
        self._temporary((tokens + blocks * width) * block * grad)

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
        return self.pending + max(self.finding + self.finding_block, self.found + self.solving)


def is_projected(parameter: Local, config: RunConfig) -> bool:
    """Whether the rule acts on this parameter's gradient; see `units_of`."""
    everything = config.projection.parameters == "all" and config.projection.rule != "subspace"
    return everything or parameter.row.linear


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


def lookup_workspace(
    sizes: Sizes, table: Local, budget: int, *, projects: bool, squares: bool
) -> int:
    """An untied embedding's: dY, and the rows that its tokens use, by sequence.

    ``squares``: |A|^2 is needed, too.
    """
    grad = sizes.precision.gradient
    held = sizes.tokens * sizes.hidden * grad
    scaled = 2 * held  # dY of the tokens, scaled
    if not projects:
        return held + scaled
    row = sizes.sequences * sizes.hidden * grad
    used = min(sizes.tokens, table.shape[0])
    block = max(1, budget // row)
    blocks = 1 if used <= block else 2
    energy = table.count * (16 if grad < 8 else 8) if squares else 0
    return held + max(blocks * min(block, used) * row + held, scaled, energy)
