"""The FP8 validity gate: how much FP8 operands change the projection.

Sequence gradients ``G_s = dY_s^T X_s`` of a linear weight can be formed from X and dY as they were,
in bfloat16, or as FP8 has them; G' are those of FP8. At the first step of a process and every
``projection.fp8_gate_every`` steps, one microbatch is looked at with both. With E = G' - G, all of
it follows from the inner products of G, E and the gradient A that has been accumulated before,
``M = [G E A]^T [G E A]`` (2k + 1, 2k + 1) of each unit, formed in blocks of rows:

    K' = K + G^T E + E^T G + E^T E,    c' = c + E^T A,    A' = A + (G + E) w'

E stands there instead of G', for small differences then keep their digits, and equal operands give
figures of exactly 0. Of a unit, the gate reports:

- beta_error: |n (b' - b)| / |n b| with n_s = |G_s|. b is what the rule takes off the advantages:
  eta * beta after the clamp, or what ISOPO's rules change. A sequence with a longer gradient has a
  smaller coefficient to the same effect; n makes of each entry the length of what it takes out.
  Nearly parallel sequences can trade coefficients while hardly anything else is removed, so that
  this can be far above
- removed_error: |G' b' - G b| / |G b|, the relative error of the removed part itself;
- the cosine between A after this microbatch from bfloat16 operands and from FP8 operands.

Where b = 0, as nothing has been accumulated yet or by the rule (subspace: no K), only the cosine
says anything, there between A + G a and A + G' a. X and dY themselves come from layers that compute
in FP8: what that does to them is not measured here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist

from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.distributed.topology import Axis, Topology
from proma_megatron.projection.factors.contraction import Rows, chunk_rows, contract
from proma_megatron.projection.factors.workspace import Workspace
from proma_megatron.projection.rules.proma import Solution, all_finite
from proma_megatron.projection.units import Unit
from proma_megatron.types import Microbatch, PackedSequences
from proma_megatron.weights.shards import Reduction

Pair = tuple[torch.Tensor, torch.Tensor]  # `layers.Operands`: X (T, in) and dY (T, out)

# --------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class Difference:
    """What FP8 operands change at one unit in one microbatch; NaN where that is not finite."""

    unit: str
    beta_error: float | None  # None: the rule takes nothing off
    removed_error: float | None
    product: float  # <A, A'> after the microbatch
    square: float  # |A|^2
    fp8_square: float  # |A'|^2

    @property
    def cosine(self) -> float:
        return _cosine(self.product, self.square, self.fp8_square)


@dataclass(frozen=True)
class GateFigures:
    """The same over all units, stages and replicas."""

    beta_error: float | None  # median over units; None: nothing was taken off anywhere
    beta_error_max: float | None
    beta_worst: str | None  # the unit of it
    removed_error: float | None  # median over units
    cosine: float  # of the whole gradient, as if the units were one vector
    cosine_min: float  # of one unit
    cosine_worst: str

    @classmethod
    def of(cls, differences: Sequence[Difference]) -> GateFigures | None:
        """Sum them up; None for none. One that is not finite makes the figures NaN, and is worst.

        Each replica has looked at a microbatch of its own: a unit counts once for each of them.
        """
        if not differences:
            return None
        errors = [(d.beta_error, d.unit) for d in differences if d.beta_error is not None]
        removed = [d.removed_error for d in differences if d.removed_error is not None]
        worst = max(errors, key=lambda found: _badness(found[0])) if errors else (None, None)
        least = max(differences, key=lambda d: _badness(-d.cosine))
        return cls(
            beta_error=_median([error for error, _ in errors]),
            beta_error_max=worst[0],
            beta_worst=worst[1],
            removed_error=_median(removed),
            cosine=_cosine(
                sum(d.product for d in differences),
                sum(d.square for d in differences),
                sum(d.fp8_square for d in differences),
            ),
            cosine_min=least.cosine,
            cosine_worst=least.unit,
        )

    def metrics(self) -> dict[str, float]:
        """Return those of a training step; without beta's where there are none."""
        found = {
            "fp8/beta_error": self.beta_error,
            "fp8/beta_error_max": self.beta_error_max,
            "fp8/removed_error": self.removed_error,
            "fp8/gradient_cosine": self.cosine,
            "fp8/gradient_cosine_min": self.cosine_min,
        }
        return {key: value for key, value in found.items() if value is not None}


def warning(figures: GateFigures, config: ProjectionConfig) -> str | None:
    """Write one sentence where a figure is beyond its threshold; None where all is well.

    With ``fp8_operands: bfloat16`` it says what FP8 operands would do, and to keep it so.
    """
    used = config.fp8_operands == "fp8"
    fix = (
        "use projection.fp8_operands=bfloat16, model.fp8_skip_first or model.fp8_skip_last, or "
        "another model.fp8"
        if used
        else "keep projection.fp8_operands=bfloat16"
    )
    if math.isnan(figures.cosine):
        return (
            f"what FP8 operands change is unknown: at {figures.cosine_worst} sequence gradients "
            f"from FP8 or from bfloat16 operands are not finite; {fix}"
        )
    found = []
    beta, removed = figures.beta_error, figures.removed_error
    if beta is not None and removed is not None and beta > config.fp8_gate_beta:
        found.append(
            f"{'change' if used else 'would change'} beta by {beta:.1%} (median; "
            f"projection.fp8_gate_beta is {config.fp8_gate_beta:g}) and what is removed by "
            f"{removed:.1%}, worst at {figures.beta_worst} ({figures.beta_error_max:.1%} of beta)"
        )
    if figures.cosine < config.fp8_gate_cosine:
        found.append(
            f"{'turn' if used else 'would turn'} the accumulated gradient, to a cosine of "
            f"{figures.cosine:.4f} (projection.fp8_gate_cosine is {config.fp8_gate_cosine:g}), "
            f"worst at {figures.cosine_worst} ({figures.cosine_min:.4f})"
        )
    return f"FP8 operands {', and '.join(found)}; {fix}" if found else None


def _median(values: Sequence[float]) -> float | None:
    if not values:
        return None
    return math.nan if any(map(math.isnan, values)) else statistics.median(values)


def _badness(value: float) -> tuple[bool, float]:
    """Return what to compare by: nothing is worse than NaN."""
    return math.isnan(value), 0.0 if math.isnan(value) else value


def _cosine(product: float, square: float, other: float) -> float:
    """Return 1 between nothing and nothing, 0 between something and nothing."""
    if square == 0 or other == 0:
        return float(square == other)
    return product / (math.sqrt(square) * math.sqrt(other))


# --------------------------------------------------------------------------- the gate


class FP8Gate:
    """Looks at one microbatch of a replica with both kinds of operands.

    In a step that is `due`, all ranks `arm` it, the accumulator hands over the weights of the
    microbatch that it `wants`, and all ranks ask for `figures` together. The accumulator comes
    before it changes A; the order of weights and microbatches doesn't matter.

    Args:
        solve: `Updater.solve` of the rule.
    """

    def __init__(
        self,
        config: ProjectionConfig,
        solve: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Solution | None],
    ) -> None:
        self.config = config
        self._solve = solve
        self.armed = False
        self._first_step: int | None = None
        self._wanted: int | None = None
        self._advantages = torch.empty(0)
        self._seen: dict[str, tuple[Unit, torch.Tensor]] = {}  # with M (2k + 1, 2k + 1) float64

    def due(self, step: int) -> bool:
        """Tell whether to look in this step: the first that is asked for, and every N steps."""
        if self._first_step is None:
            self._first_step = step
        every = self.config.fp8_gate_every
        return step == self._first_step or (every > 0 and step % every == 0)

    def arm(self, microbatches: Sequence[Microbatch]) -> None:
        """Look in the pass over this replica's ``microbatches``, up to `figures`.

        The second that has sequences is looked at: A is 0 before the first, and nothing would be
        removed. Where only one has, that one is.
        """
        filled = [microbatch.index for microbatch in microbatches if microbatch.lengths]
        self.armed = True
        self._wanted = filled[min(1, len(filled) - 1)] if filled else None
        self._seen = {}

    def wants(self, microbatch: Microbatch) -> bool:
        """Tell whether `look` is to be called for the linear weights of this microbatch."""
        return self.armed and microbatch.index == self._wanted

    @torch.no_grad()
    def look(
        self,
        microbatch: Microbatch,
        units: Sequence[Unit],
        operands: Pair,
        fp8: Pair,
        accumulated: torch.Tensor,
        workspace: Workspace,
    ) -> None:
        """Take in one linear weight; nothing of it is kept but M. No communication.

        Args:
            units: of the weight, also those without rows on this rank; what is not projected is
                passed over.
            operands: as they were.
            fp8: dequantized, of the same shapes. Tokens of no sequence may be anything.
            accumulated: A (out, in), before the microbatch is added; its dtype is computed in.
            workspace: of which the scratch is used.
        """
        projected = [unit for unit in units if unit.projected]
        if not projected:
            return
        assert all(unit.reduction is not Reduction.PARTIAL for unit in projected), "a linear weight"
        self._advantages = microbatch.advantages
        rows = [unit.rows for unit in projected]
        found = _products(operands, fp8, accumulated, rows, microbatch.sequences, workspace)
        for unit, products in zip(projected, found, strict=True):
            self._seen[unit.name] = (unit, products)

    def figures(self, topology: Topology) -> GateFigures | None:
        """Return what was seen since `arm`, the same on all ranks; disarm. A collective.

        None: no rank has seen anything.
        """
        mine = self._differences(topology.tensor)
        self.armed, self._wanted, self._seen = False, None, {}
        replicas = topology.gather_over_data(topology.gather_over_stages(mine))
        return GateFigures.of([found for stages in replicas for stage in stages for found in stage])

    # ------------------------------------------------------------------ from M to figures

    def _differences(self, tensor: Axis) -> list[Difference]:
        if not self._seen:
            return []
        names = sorted(self._seen)  # in the same order on all tensor ranks
        seen = [self._seen[name] for name in names]
        products = torch.stack([found for _, found in seen])
        shared = [n for n, (unit, _) in enumerate(seen) if unit.reduction is Reduction.DISJOINT]
        if tensor.size > 1 and shared:
            places = torch.tensor(shared, device=products.device)
            part = products[places]
            dist.all_reduce(part, group=tensor.group)
            products[places] = part
        table = self._compare(products, self._advantages)
        return [
            Difference(name, beta if takes else None, removed if takes else None, *rest)
            for name, (takes, beta, removed, *rest) in zip(names, table.tolist(), strict=True)
        ]

    def _compare(self, products: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        """Return whether b is not 0, and a `Difference`'s figures (U, 6); M (U, 2k + 1, 2k + 1)."""
        units, k = len(products), len(advantages)
        gram, cross, own = products[:, :k, :k], products[:, :k, k:-1], products[:, k:-1, k:-1]
        overlap, change = products[:, :k, -1], products[:, k:-1, -1]
        taken, finite = self._taken(gram, overlap, advantages)
        fp8_gram = gram + cross + cross.mT + own
        fp8_taken, fp8_finite = self._taken(fp8_gram, overlap + change, advantages)
        finite = finite & fp8_finite & all_finite(products, 2)

        nothing, one = torch.zeros_like(taken), taken.new_ones(units, 1)
        before = torch.cat([taken, nothing, 0 * one], dim=1)
        difference = torch.cat([fp8_taken - taken, fp8_taken, 0 * one], dim=1)
        after = torch.cat([advantages - taken, nothing, one], dim=1)
        fp8_after = torch.cat([advantages - fp8_taken] * 2 + [one], dim=1)
        lengths = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        size = torch.linalg.vector_norm(lengths * taken, dim=-1)
        error = torch.linalg.vector_norm(lengths * (fp8_taken - taken), dim=-1)
        figures = torch.stack(
            [
                _ratio(error, size),
                _ratio(_square(products, difference).sqrt(), _square(products, before).sqrt()),
                _form(products, after, fp8_after),
                _square(products, after),
                _square(products, fp8_after),
            ],
            dim=1,
        )
        figures = torch.where(finite[:, None], figures, torch.nan)
        takes = ((size > 0) | ~finite).to(figures.dtype)
        return torch.cat([takes[:, None], figures], dim=1)

    def _taken(
        self, gram: torch.Tensor, overlap: torch.Tensor, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the rule takes off the advantages (U, k), and whether that is finite (U,)."""
        solution = self._solve(gram, overlap, advantages)
        if solution is None:
            return torch.zeros_like(overlap), torch.ones_like(overlap[:, 0], dtype=torch.bool)
        return advantages - solution.coefficients, solution.finite


def _form(products: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left^T M right (U,), of vectors (U, 2k + 1)."""
    return (left[:, None, :] @ products @ right[..., None])[:, 0, 0]


def _square(products: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return _form(products, vector, vector).clamp(min=0)


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Divide, where 0 of nothing is 0."""
    return torch.where(part == 0, 0.0, part / whole)


# --------------------------------------------------------------------------- from operands to M


def _products(
    operands: Pair,
    fp8: Pair,
    accumulated: torch.Tensor,
    units: Sequence[Rows],
    sequences: PackedSequences,
    workspace: Workspace,
) -> list[torch.Tensor]:
    """Return M (2k + 1, 2k + 1) of each unit, float64, of this rank's entries."""
    k, (rows, width) = sequences.count, accumulated.shape
    slices = 2 * k + 1
    chunk = chunk_rows(units, rows, width)
    chunk_bytes = slices * chunk * width * accumulated.element_size()
    step = max(1, workspace.block_bytes // chunk_bytes) * chunk
    sums = accumulated.new_zeros((len(units), slices, slices), dtype=torch.float64)
    for low in range(0, rows, step):
        high = min(low + step, rows)
        stack = workspace.scratch((slices, high - low, width), accumulated.dtype)
        _fill(stack[:k], operands, low, high, sequences)
        _fill(stack[k:-1], fp8, low, high, sequences)
        stack[k:-1] -= stack[:k]
        stack[-1] = accumulated[low:high]
        found = contract(stack, slices, chunk)
        for whole, unit in zip(sums, units, strict=True):
            for start, stop in unit:
                first, last = max(start, low) - low, min(stop, high) - low
                if first < last:
                    part = found[first // chunk : last // chunk]
                    whole += part.sum(dim=0, dtype=torch.float64)
    return list(sums)


def _fill(
    out: torch.Tensor, operands: Pair, low: int, high: int, sequences: PackedSequences
) -> None:
    """Fill in rows ``low`` to ``high`` of G (k, out, in), widened to its dtype one by one."""
    x, dy = operands
    for gradient, (start, stop) in zip(out, pairwise(sequences.offsets), strict=True):
        columns = dy[start:stop, low:high].to(out.dtype)
        torch.mm(columns.t(), x[start:stop].to(out.dtype), out=gradient)
