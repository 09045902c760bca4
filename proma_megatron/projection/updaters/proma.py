"""PROMA's rules at work: project what has been accumulated, then add the microbatch.

K and c of weights, and the short vectors of norms and biases, are summed over the tensor-parallel
group in one collective; every rank then solves the same small problems in float64, those of vectors
at the end of the microbatch's backward pass, and changes its own part of ``main_grad``. Summands
are of a weight half of K, c (k,) and |A|^2 (); of a norm or bias G^T (k, n) and A (n,) themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.distributed.topology import Axis
from proma_megatron.projection.capture import Capture
from proma_megatron.projection.diagnostics import Tally
from proma_megatron.projection.factors.vector import VectorFactors, take
from proma_megatron.projection.rules.proma import Rule, Solution, solve, solve_vectors
from proma_megatron.projection.units import Unit
from proma_megatron.projection.updaters.sums import (
    GroupSum,
    PartialSums,
    start_group_sum,
    symmetric,
    triangle,
)
from proma_megatron.projection.updaters.updater import add, add_unprojected
from proma_megatron.types import Microbatch
from proma_megatron.weights.shards import Reduction

# Eigenvalues of the normalized K below these are taken for rounding noise: that of its entries,
# which are sums in the accumulation dtype, and that of the sequence gradients behind them.
CUTOFFS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-4}


@dataclass(frozen=True)
class Vector:
    """A unit that is projected as a whole vector; every tensor rank has all of it."""

    capture: Capture
    unit: Unit
    gradients: torch.Tensor  # G^T (k, n) float64
    accumulated: torch.Tensor  # A (n,) float64

    @classmethod
    def of(cls, found: PartialSums, gradients: torch.Tensor, accumulated: torch.Tensor) -> Vector:
        """Keep a unit's vectors; copies where a larger tensor would live on with them."""
        parts = (gradients, accumulated)
        own = [
            part.clone() if part.untyped_storage().nbytes() > part.nbytes else part
            for part in parts
        ]
        return cls(found.capture, found.unit, *own)

    @property
    def nbytes(self) -> int:
        mine = self.gradients.nbytes + self.accumulated.nbytes
        return mine + self.capture.factors.nbytes


class PromaUpdater:
    """Projects what groups of parameters have accumulated, and adds a microbatch to them.

    Args:
        dtype: the compute dtype, whose rounding the sequence gradients carry.
    """

    def __init__(self, config: ProjectionConfig, tensor: Axis, dtype: torch.dtype) -> None:
        assert config.rule in ("exact", "iterative", "ridge")
        self.rule: Rule = config.rule
        self.shrinkage = config.shrinkage
        self.bound = config.bound
        self.cutoff = CUTOFFS[dtype]
        self.tensor = tensor
        self.tally = Tally()
        self.accumulates = True

    def asks_for_gradients(self, *, first: bool) -> bool:
        # With A = 0 nothing is removed: the plain GEMM is the whole update.
        return not first

    def solve(
        self, gram: torch.Tensor, overlap: torch.Tensor, advantages: torch.Tensor
    ) -> Solution:
        return solve(
            self.rule,
            gram,
            overlap,
            advantages,
            shrinkage=self.shrinkage,
            bound=self.bound,
            cutoff=self.cutoff,
        )

    def take(self, capture: Capture, microbatch: Microbatch) -> list[PartialSums]:
        projected = add_unprojected(capture, microbatch, projects=not capture.first)
        if isinstance(capture.factors, VectorFactors):
            return [self._vector(capture, unit, capture.factors) for unit in projected]
        if not projected:
            return []
        products = capture.factors.products([unit.rows for unit in projected], capture.main_grad)
        return [
            PartialSums(capture, unit, (triangle(found.gram), found.overlap, found.energy))
            for unit, found in zip(projected, products, strict=True)
        ]

    def start(self, pending: Sequence[PartialSums]) -> GroupSum:
        return start_group_sum(sorted(pending, key=_is_vector), self.tensor)

    def finish(self, started: GroupSum, microbatch: Microbatch) -> list[Vector]:
        """Set ``A <- A - clamp(projection) + G a`` for every weight's unit; vectors can wait."""
        matrices = [found for found in started.units if not _is_vector(found)]
        vectors = [found for found in started.units if _is_vector(found)]
        sums = started.wait()  # of matrices first, as they were started
        if matrices:
            self._solve_matrices(matrices, [next(sums) for _ in matrices], microbatch)
        return [Vector.of(found, *whole) for found, whole in zip(vectors, sums, strict=True)]

    def finish_late(self, late: Sequence[Vector], microbatch: Microbatch) -> None:
        """Do the same for whole vectors, all of one length at a time."""
        by_length: dict[int, list[Vector]] = {}
        for vector in late:
            by_length.setdefault(len(vector.accumulated), []).append(vector)
        for vectors in by_length.values():
            self._solve_vectors(vectors, microbatch)

    def _solve_matrices(
        self,
        matrices: Sequence[PartialSums],
        wholes: Sequence[tuple[torch.Tensor, ...]],
        microbatch: Microbatch,
    ) -> None:
        advantages = microbatch.advantages
        triangles, overlap, energy = (torch.stack(part) for part in zip(*wholes, strict=True))
        gram = symmetric(triangles, len(advantages))
        solution = self.solve(gram, overlap, advantages)
        self.tally.check(microbatch.index, solution.finite)
        names = tuple(matrix.unit.name for matrix in matrices)
        self.tally.add(names, gram, energy, advantages, solution)
        add([(found.capture, found.unit) for found in matrices], solution.coefficients)

    def _solve_vectors(self, vectors: Sequence[Vector], microbatch: Microbatch) -> None:
        advantages = microbatch.advantages
        gradients = torch.stack([vector.gradients for vector in vectors])
        accumulated = torch.stack([vector.accumulated for vector in vectors])
        solution = solve_vectors(
            self.rule,
            gradients,
            accumulated,
            advantages,
            shrinkage=self.shrinkage,
            bound=self.bound,
            cutoff=self.cutoff,
        )
        self.tally.check(microbatch.index, solution.finite)
        names = tuple(vector.unit.name for vector in vectors)
        gram, energy = gradients @ gradients.mT, accumulated.square().sum(dim=-1)
        self.tally.add(names, gram, energy, advantages, solution)
        for vector, part in zip(vectors, solution.removed_part, strict=True):
            self._subtract(vector, part)
        units = [(vector.capture, vector.unit) for vector in vectors]
        add(units, [advantages] * len(units))

    # ------------------------------------------------------------------ whole vectors

    def _vector(self, capture: Capture, unit: Unit, factors: VectorFactors) -> PartialSums:
        """Return this rank's summand of the unit's whole vectors.

        Of a bias each rank holds a slice; it stands at the rank's place among zeros. Entries of
        other units of the same bias are zeros as well, which changes no product.
        """
        gradients, accumulated = factors.gradients.double(), capture.main_grad.double()
        if unit.reduction is Reduction.DISJOINT:
            length = len(accumulated)
            start = self.tensor.rank * length
            wide = gradients.new_zeros((len(gradients), length * self.tensor.size))
            whole = accumulated.new_zeros(length * self.tensor.size)
            for low, high in unit.rows:
                wide[:, start + low : start + high] = gradients[:, low:high]
                whole[start + low : start + high] = accumulated[low:high]
            return PartialSums(capture, unit, (wide, whole))
        whole = take(accumulated[None], unit.rows)[0]
        return PartialSums(capture, unit, (take(gradients, unit.rows), whole))

    def _subtract(self, vector: Vector, removed: torch.Tensor) -> None:
        """Take ``removed``, a whole vector, out of this rank's part."""
        unit, target = vector.unit, vector.capture.main_grad
        if unit.reduction is Reduction.DISJOINT:
            start = self.tensor.rank * len(target)
            for low, high in unit.rows:
                target[low:high] -= removed[start + low : start + high].to(target.dtype)
            return
        if unit.reduction is Reduction.PARTIAL:
            removed = removed / self.tensor.size  # Megatron adds the ranks' parts
        at = 0
        for low, high in unit.rows:
            target[low:high] -= removed[at : at + high - low].to(target.dtype)
            at += high - low


def _is_vector(found: PartialSums) -> bool:
    return isinstance(found.capture.factors, VectorFactors)
