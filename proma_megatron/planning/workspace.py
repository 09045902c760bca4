"""Bytes that weight gradients take before they are in ``main_grad``.

Without the projection that is one parameter's gradient at a time. With it, a weight is done with
when its layer hands it over, on the first microbatch, or its sequence gradients G are kept in the
workspace until its group is solved, up to half of ``projection.workspace_mb``. What does not fit is
formed in blocks, and its factors x and dY wait, in the main gradients' dtype, as they do for
Intra-PROMA. Blocks, and tokens that are scaled for a GEMM, take turns in another part of the
workspace. Both parts stay from one group and microbatch to the next, and on a CPU, for which no
plan is made, from step to step.

Intra-PROMA forms no G of single sequences: it has matrices of T rows in float64 for each X and dY
of the group, and the unit's gradient in blocks. What a factorization needs inside is not counted,
and `auto` is taken to keep what fits.

Short vectors are not counted: their sequence gradients wait, up to 16 MiB of them, for the end of
the microbatch, and their solve makes a few copies.
"""

from __future__ import annotations

from dataclasses import dataclass

from proma_megatron.config.run import RunConfig
from proma_megatron.planning.shapes import Local
from proma_megatron.planning.sizes import Sizes
from proma_megatron.projection.sizes import BLOCK_BYTES, is_direct, kept_slices, sketch_width
from proma_megatron.weights.shards import Fusion


@dataclass
class Group:
    """Captures that are solved together; weights enter in the order of the backward pass."""

    sizes: Sizes
    config: RunConfig
    projects: bool  # the rule acts on this microbatch; PROMA's do not on the first
    held: int = 0  # bytes of factors that wait
    materialized: int = 0  # of the workspace
    scratch: int = 0  # of the workspace, in passing
    passing: int = 0  # the last weight's factors, where they need another dtype
    solving: int = 0  # the largest temporary of the solve
    finding: int = 0  # Intra-PROMA: what all subspaces take together while they are sought,
    finding_block: int = 0  # with a block in passing,
    found: int = 0  # and after

    def add(self, weight: Local, *, lookup: bool = False) -> None:
        """Add the gradient of a weight (out, in), plus that of a lookup in the same table."""
        sizes, grad = self.sizes, self.sizes.precision.gradient
        rows, width = weight.shape
        factors = sizes.tokens * (rows + width) * grad
        self.passing = factors if grad > sizes.precision.compute else 0
        if lookup:
            self.passing += 2 * sizes.tokens * width * grad  # its dY, and rows of it in order
        if not (self.projects and is_projected(weight, self.config)):
            self._scale(sizes.tokens * min(rows, width) * grad)
            return
        if self.config.projection.by_subspaces:
            self.held += factors
            self.passing = 0
            self._add_subspaces(weight, _range_rows(weight, self.config, sizes.tensor))
            return
        size = slices_of(self.config, sizes) * weight.count * grad
        keeps = self.config.projection.gradients != "stream"
        if keeps and self.materialized + size <= self.half:
            self.materialized += size
            return
        self.held += factors + (sizes.tokens * width * grad if lookup else 0)
        self.passing = sizes.tokens * width * grad if lookup else 0
        row = passing_slices(self.config, sizes) * width * grad
        self.scratch = max(self.scratch, min(rows, max(1, self.block // row)) * row)
        self._scale(sizes.tokens * rows * grad)

    def _scale(self, size: int) -> None:
        self.scratch = max(self.scratch, min(size, self.half))

    def _add_subspaces(self, weight: Local, range_rows: int) -> None:
        """Add those of X and of every unit's dY, and the gradient that is formed in blocks."""
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
            self.finding_block = max(self.finding_block, min(self.half, most))
        # Bases, images, and the removed part's left factor.
        self.found += 8 * rank * (2 * rows + width + (1 + units) * tokens)
        block = min(range_rows, max(1, self.half // (max(tokens, width) * grad)))
        blocks = 1 if range_rows <= block else 2
        self._temporary((tokens + blocks * width) * block * grad)

    def _temporary(self, size: int) -> None:
        self.solving = max(self.solving, size)

    @property
    def half(self) -> int:
        """Half of the workspace is for G that is kept, half for blocks in passing."""
        return int(self.config.projection.workspace_mb * 2**20 // 2)

    @property
    def block(self) -> int:
        """Bytes of a block in passing."""
        return min(self.half, BLOCK_BYTES)

    def beside(self, kept: int, scratch: int) -> int:
        """Return bytes when the last weight is handed over, in a workspace that was this large."""
        workspace = max(self.materialized, kept) + max(self.scratch, scratch)
        return self.held + self.passing + workspace

    def peak(self, kept: int, scratch: int) -> int:
        """Return bytes when the group is solved."""
        workspace = max(self.materialized, kept) + max(self.scratch, scratch)
        passing = max(self.finding + self.finding_block, self.found + self.solving)
        return self.held + workspace + passing


def slices_of(config: RunConfig, sizes: Sizes) -> int:
    """Return what a weight's sequence gradients take where they are kept, in weights."""
    return kept_slices(sizes.sequences, accumulates=not config.projection.acts_alone)


def passing_slices(config: RunConfig, sizes: Sizes) -> int:
    """Return what they take of each row in passing: k, and what A holds."""
    return sizes.sequences + (0 if config.projection.acts_alone else 1)


def is_projected(parameter: Local, config: RunConfig) -> bool:
    """Tell whether the rule acts on this parameter's gradient; see `units_of`."""
    everything = config.projection.parameters == "all" and not config.projection.by_subspaces
    return everything or parameter.row.linear


def _range_rows(weight: Local, config: RunConfig, tensor: int) -> int:
    """Return local rows of the largest run of adjacent rows of a unit."""
    rows = weight.shape[0]
    if weight.row.axis != 0 or weight.row.fusion is Fusion.NONE:
        return rows
    if config.projection.unit == "megatron":
        return rows
    if weight.row.fusion is Fusion.RANK:
        return max(weight.lengths) // tensor
    return min(rows, max(weight.lengths) // config.model.kv_heads)


@dataclass(frozen=True)
class LookupWorkspace:
    """An untied embedding's: dY, and the rows that its tokens use, by sequence."""

    held: int
    scratch: int
    passing: int

    @classmethod
    def of(cls, sizes: Sizes, table: Local, block: int, slices: int) -> LookupWorkspace:
        """Return what a table takes.

        Args:
            block: bytes of a block in passing.
            slices: of each row that is used; 0: nothing is projected.
        """
        grad = sizes.precision.gradient
        tokens = sizes.tokens * sizes.hidden * grad
        row = slices * sizes.hidden * grad
        used = min(sizes.tokens, table.shape[0])
        scratch = min(used, max(1, block // row)) * row if row else 0
        copied = tokens if grad > sizes.precision.compute else 0
        return cls(held=copied, scratch=scratch, passing=2 * tokens)
