"""Reduce, solve, apply: what one microbatch does to a group of captured parameters.

K and c of weights, and the short vectors of norms and biases, are summed over the tensor-parallel
group in one collective; every rank then solves the same small problems in float64 and changes its
own part of ``main_grad``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from proma_megatron.config import ProjectionConfig
from proma_megatron.policy.parameters import ParameterShard, Reduction
from proma_megatron.projection.diagnostics import Tally
from proma_megatron.projection.factors import Factors, VectorFactors, take
from proma_megatron.projection.rules import Rule, solve, solve_vectors
from proma_megatron.projection.units import Unit
from proma_megatron.records import Microbatch
from proma_megatron.topology import Axis

# Eigenvalues of the normalized K below these are taken for rounding noise: that of its entries,
# which are sums in the accumulation dtype, and that of the sequence gradients behind them.
CUTOFFS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-4}


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


@dataclass(frozen=True)
class _Summands:
    """What this rank adds to the sums that a unit is solved from.

    Of a weight K (k, k), c (k,) and |A|^2 (); of a norm or bias G^T (k, n) and A (n,) themselves.
    """

    capture: Capture
    unit: Unit
    tensors: tuple[torch.Tensor, ...]


class Solver:
    """Projects what groups of parameters have accumulated, and adds a microbatch to them.

    Args:
        dtype: the compute dtype, whose rounding the sequence gradients carry.
    """

    def __init__(self, config: ProjectionConfig, tensor: Axis, dtype: torch.dtype) -> None:
        assert config.rule != "none", "rule 'none' is Megatron's own accumulation"
        self.rule: Rule = config.rule
        self.shrinkage = config.shrinkage
        self.bound = config.bound
        self.cutoff = CUTOFFS[dtype]
        self.tensor = tensor
        self.tally = Tally()

    def update(self, captures: Sequence[Capture], microbatch: Microbatch) -> None:
        """``A <- A - clamp(projection) + G a`` for every unit of these parameters."""
        matrices: list[_Summands] = []
        vectors: list[_Summands] = []
        for capture in captures:
            for unit in capture.units:
                if capture.first or not unit.projected or not microbatch.sequences.count:
                    _add(capture, unit, microbatch.advantages)
                elif isinstance(capture.factors, VectorFactors):
                    vectors.append(self._vector(capture, unit, capture.factors))
                else:
                    matrices.append(_products(capture, unit, capture.factors))
        sums = self._sum_over_tensor_group([*matrices, *vectors])
        try:
            self._solve(matrices, vectors, sums, microbatch.advantages)
        except torch.linalg.LinAlgError:
            raise self._not_finite([*matrices, *vectors], microbatch) from None

    def _not_finite(self, units: Sequence[_Summands], microbatch: Microbatch) -> RuntimeError:
        names = [
            found.unit.name
            for found in units
            if not all(bool(tensor.isfinite().all()) for tensor in found.tensors)
        ]
        return RuntimeError(
            f"sequence gradients are not finite in microbatch {microbatch.index}: "
            f"{', '.join(names) or 'on another tensor rank'}"
        )

    def _solve(
        self,
        matrices: Sequence[_Summands],
        vectors: Sequence[_Summands],
        sums: Iterator[tuple[torch.Tensor, ...]],
        advantages: torch.Tensor,
    ) -> None:
        if matrices:
            self._solve_matrices(matrices, [next(sums) for _ in matrices], advantages)
        by_length: dict[int, list[tuple[_Summands, tuple[torch.Tensor, ...]]]] = {}
        for vector, whole in zip(vectors, sums, strict=True):
            by_length.setdefault(len(whole[1]), []).append((vector, whole))
        for group in by_length.values():
            found, wholes = zip(*group, strict=True)
            self._solve_vectors(found, wholes, advantages)

    def _solve_matrices(
        self,
        matrices: Sequence[_Summands],
        wholes: Sequence[tuple[torch.Tensor, ...]],
        advantages: torch.Tensor,
    ) -> None:
        gram, overlap, energy = (torch.stack(part) for part in zip(*wholes, strict=True))
        solution = solve(
            self.rule,
            gram,
            overlap,
            advantages,
            shrinkage=self.shrinkage,
            bound=self.bound,
            cutoff=self.cutoff,
        )
        names = tuple(matrix.unit.name for matrix in matrices)
        self.tally.add(names, gram, energy, advantages, solution)
        for matrix, coefficients in zip(matrices, solution.coefficients, strict=True):
            _add(matrix.capture, matrix.unit, coefficients)

    def _solve_vectors(
        self,
        vectors: Sequence[_Summands],
        wholes: Sequence[tuple[torch.Tensor, ...]],
        advantages: torch.Tensor,
    ) -> None:
        gradients, accumulated = (torch.stack(part) for part in zip(*wholes, strict=True))
        solution = solve_vectors(
            self.rule,
            gradients,
            accumulated,
            advantages,
            shrinkage=self.shrinkage,
            bound=self.bound,
            cutoff=self.cutoff,
        )
        names = tuple(vector.unit.name for vector in vectors)
        gram, energy = gradients @ gradients.mT, accumulated.square().sum(dim=-1)
        self.tally.add(names, gram, energy, advantages, solution)
        for vector, part in zip(vectors, solution.removed_part, strict=True):
            self._subtract(vector, part)
            _add(vector.capture, vector.unit, advantages)

    # ------------------------------------------------------------------ whole vectors

    def _vector(self, capture: Capture, unit: Unit, factors: VectorFactors) -> _Summands:
        """This rank's summand of the unit's whole vectors.

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
            return _Summands(capture, unit, (wide, whole))
        whole = take(accumulated[None], unit.rows)[0]
        return _Summands(capture, unit, (take(gradients, unit.rows), whole))

    def _subtract(self, vector: _Summands, removed: torch.Tensor) -> None:
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

    # ------------------------------------------------------------------ the collective

    def _sum_over_tensor_group(
        self, units: Sequence[_Summands]
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """Each unit's summands (float64) added up over TP, all of them in one collective.

        What every rank holds whole is left as it is.
        """
        shared = [
            tensor
            for found in units
            if found.unit.reduction is not Reduction.REPLICATED
            for tensor in found.tensors
        ]
        summed: Iterator[torch.Tensor] = iter(())
        if shared:
            flat = torch.cat([tensor.flatten() for tensor in shared])
            dist.all_reduce(flat, group=self.tensor.group)
            parts = flat.split([tensor.numel() for tensor in shared])
            summed = (part.view(tensor.shape) for part, tensor in zip(parts, shared, strict=True))
        return iter(
            [
                found.tensors
                if found.unit.reduction is Reduction.REPLICATED
                else tuple(next(summed) for _ in found.tensors)
                for found in units
            ]
        )


def _add(capture: Capture, unit: Unit, coefficients: torch.Tensor) -> None:
    if unit.rows and len(coefficients):
        capture.factors.update(unit.rows, capture.main_grad, coefficients)


def _products(capture: Capture, unit: Unit, factors: Factors) -> _Summands:
    gram, overlap = factors.products(unit.rows, capture.main_grad)
    energy = gram.new_zeros(())
    for low, high in unit.rows:
        energy = energy + capture.main_grad[low:high].double().square().sum()
    return _Summands(capture, unit, (gram, overlap, energy))
