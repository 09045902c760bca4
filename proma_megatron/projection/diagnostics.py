"""What K and c say about an update: per unit, and summed up over units and microbatches.

Nothing here reads a gradient: every figure comes from numbers that the rule needs anyway, k + k^2
of a unit for PROMA's. There a parameter's first microbatch is not counted, for no K is formed
before something has been accumulated. What "removed" and "accumulated" are depends on the rule:

- exact, iterative, ridge: what is taken out of A, and the A that it is taken from;
- kernel, norm: G (a - a'), what the transformed advantages change, and the plain P = G a;
- subspace: what is taken out of the microbatch's own gradient G, and that G. There is no K, and so
  only energies and the clamp are known.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from proma_megatron.projection.rules.proma import Outcome
from proma_megatron.projection.units import kind_of, layer_of

if TYPE_CHECKING:
    from proma_megatron.distributed.topology import Topology

ROUNDING = 1e-12  # relative; sums of products smaller than this say nothing


@dataclass(frozen=True)
class UnitSums:
    """Sums of one unit over microbatches; of several units, ranks or replicas where added."""

    solved: float = 0.0  # projections, or transformations of advantages
    clamped: float = 0.0  # of them met the bound
    removed: float = 0.0  # |removed|^2
    accumulated: float = 0.0  # |.|^2 of what it is compared with; A before projecting
    effective_rank: float = 0.0  # (tr K)^2 / |K|_F^2: 1 to k, 0 if all are silent
    cosine: float = 0.0  # mean pairwise cosine of the sequences' gradients
    cosines: float = 0.0  # microbatches that have a pair
    pair_product: float = 0.0  # <x_r, x_s> over ordered pairs r != s, with x_s = a_s G_s
    pairs: float = 0.0
    square: float = 0.0  # |x_s|^2 over sequences
    sequences: float = 0.0
    residual: float = 0.0  # largest of |<A, u_s>| after projecting, over |A| before

    def __add__(self, other: UnitSums) -> UnitSums:
        return UnitSums(
            **{
                field.name: (max if field.name == "residual" else operator.add)(
                    getattr(self, field.name), getattr(other, field.name)
                )
                for field in fields(UnitSums)
            }
        )

    @property
    def noise_scale(self) -> float | None:
        """tr(cov) / |mean|^2 of the sequences' policy gradients, in sequences.

        The mean's square is estimated from pairs of different sequences, without bias, and so may
        come out negative when noise prevails; then there is no figure. Source: McCandlish et al.,
        "An empirical model of large-batch training" (arXiv:1812.06162), section 2.2.
        """
        if not self.pairs or self.pair_product <= ROUNDING * self.square:
            return None
        mean_square = self.pair_product / self.pairs
        return self.square / self.sequences / mean_square - 1

    def figures(self) -> dict[str, float]:
        """Return fractions and means; empty where nothing was projected (a single microbatch)."""
        if not self.solved:
            return {}
        found = {
            "removed_energy": self.removed / self.accumulated if self.accumulated else 0.0,
            "clamp_rate": self.clamped / self.solved,
        }
        if not self.sequences:
            return found  # no K was formed
        found |= {
            "effective_rank": self.effective_rank / self.solved,
            "cosine": self.cosine / self.cosines if self.cosines else 0.0,
            "orthogonality_residual": self.residual,
        }
        noise = self.noise_scale
        return found if noise is None else found | {"noise_scale": noise}


_FIELDS = tuple(field.name for field in fields(UnitSums))


@dataclass(frozen=True)
class _Batch:
    """Units that were solved from one microbatch."""

    names: tuple[str, ...]
    gram: torch.Tensor  # (U, k, k)
    energy: torch.Tensor  # (U,)
    advantages: torch.Tensor  # (k,)
    outcome: Outcome  # (U,)

    @classmethod
    def joined(cls, batches: Sequence[_Batch]) -> _Batch:
        """Join the units of two groups of the same microbatch."""
        names = tuple(name for batch in batches for name in batch.names)
        outcomes = [batch.outcome for batch in batches]
        outcome = Outcome(
            **{
                field.name: torch.cat([getattr(found, field.name) for found in outcomes])
                for field in fields(Outcome)
            }
        )
        return cls(
            names,
            torch.cat([batch.gram for batch in batches]),
            torch.cat([batch.energy for batch in batches]),
            batches[0].advantages,
            outcome,
        )


class Tally:
    """Collects the sums of each unit during a backward pass, without waiting for the device.

    Figures of a unit that is not finite are not either.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], torch.Tensor] = {}  # (U, fields of UnitSums)
        self._added: list[_Batch] = []  # not counted yet
        self._finite: list[tuple[int, torch.Tensor]] = []  # microbatch, (U,) bool

    def check(self, microbatch: int, finite: torch.Tensor) -> None:
        """Keep in mind which of these units were left alone in this microbatch; (U,) bool."""
        self._finite.append((microbatch, finite))

    def not_finite(self) -> list[int]:
        """Return microbatches that left a unit of this rank alone; one transfer where none did."""
        if not self._finite or bool(torch.cat([finite for _, finite in self._finite]).all()):
            return []
        return sorted({m for m, finite in self._finite if not bool(finite.all())})

    def add(
        self,
        names: tuple[str, ...],
        gram: torch.Tensor,
        energy: torch.Tensor,
        advantages: torch.Tensor,
        outcome: Outcome,
    ) -> None:
        """Take in a batch of units: K (U, k, k), |A|^2 or what stands for it (U,), a (k,).

        Units of one microbatch come with the same tensor of advantages.
        """
        kept = Outcome(**{field.name: getattr(outcome, field.name) for field in fields(Outcome)})
        self._added.append(_Batch(names, gram, energy, advantages, kept))

    def settle(self) -> None:
        """Count what was added, all of it together: these are many operations on few numbers."""
        added, self._added = self._added, []
        by_microbatch: dict[int, list[_Batch]] = {}
        for batch in added:
            by_microbatch.setdefault(id(batch.advantages), []).append(batch)
        for batches in by_microbatch.values():
            self._count_batch(_Batch.joined(batches))

    def _count_batch(self, batch: _Batch) -> None:
        names, gram, energy = batch.names, batch.gram, batch.energy
        advantages, outcome = batch.advantages, batch.outcome
        k = gram.shape[-1]
        tiny = torch.finfo(gram.dtype).tiny
        diagonal = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0)
        square = gram.square().sum(dim=(-2, -1))
        rank = torch.where(square > 0, diagonal.sum(dim=-1).square() / square.clamp(min=tiny), 0.0)
        norms = diagonal.sqrt()
        product = norms[..., :, None] * norms[..., None, :]
        cosines = torch.where(product > 0, gram / product.clamp(min=tiny), 0.0)
        present = (norms > 0).sum(dim=-1)
        off = cosines.sum(dim=(-2, -1)) - cosines.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        pairs = (present * (present - 1)).double()
        own = (diagonal * advantages.square()).sum(dim=-1)
        ones = torch.ones_like(energy)
        residual = torch.where(energy > 0, outcome.residual / energy.sqrt().clamp(min=tiny), 0.0)
        found = UnitSums(
            solved=ones,  # type: ignore[arg-type]
            clamped=outcome.clamped.double(),  # type: ignore[arg-type]
            removed=outcome.removed,  # type: ignore[arg-type]
            accumulated=energy,  # type: ignore[arg-type]
            effective_rank=rank,  # type: ignore[arg-type]
            cosine=torch.where(pairs > 0, off / pairs.clamp(min=1), 0.0),  # type: ignore[arg-type]
            cosines=(pairs > 0).double(),  # type: ignore[arg-type]
            pair_product=outcome.policy - own,  # type: ignore[arg-type]
            pairs=ones * (k * (k - 1)),  # type: ignore[arg-type]
            square=own,  # type: ignore[arg-type]
            sequences=ones * k,  # type: ignore[arg-type]
            residual=residual,  # type: ignore[arg-type]
        )
        self._count(names, found)

    def add_energies(
        self,
        names: tuple[str, ...],
        removed: torch.Tensor,
        accumulated: torch.Tensor,
        clamped: torch.Tensor,
    ) -> None:
        """Count a batch of units without a K: squared norms, and whether the bound bit; (U,)."""
        nothing = torch.zeros_like(removed)
        figures = dict.fromkeys(_FIELDS, nothing)
        figures |= {
            "solved": torch.ones_like(removed),
            "clamped": clamped.double(),
            "removed": removed,
            "accumulated": accumulated,
        }
        self._count(names, UnitSums(**figures))  # type: ignore[arg-type]

    def _count(self, names: tuple[str, ...], found: UnitSums) -> None:
        rows = torch.stack([getattr(found, name) for name in _FIELDS], dim=-1)
        before = self._sums.get(names)
        if before is None:
            self._sums[names] = rows
            return
        worst = torch.maximum(before[:, -1], rows[:, -1])
        before += rows
        before[:, -1] = worst

    def units(self) -> dict[str, UnitSums]:
        """Return the sums of each unit that was projected, by its name; one transfer per group."""
        self.settle()
        found: dict[str, UnitSums] = {}
        for names, rows in self._sums.items():
            for name, row in zip(names, rows.tolist(), strict=True):
                found[name] = found.get(name, UnitSums()) + UnitSums(*row)
        return found


Units = Mapping[str, UnitSums]


def merge(parts: Iterable[Units]) -> dict[str, UnitSums]:
    """Add up units of several stages, replicas or minibatches."""
    found: dict[str, UnitSums] = {}
    for part in parts:
        for name, sums in part.items():
            found[name] = found.get(name, UnitSums()) + sums
    return found


def gather(mine: Units, topology: Topology) -> dict[str, UnitSums]:
    """Gather units of all stages and replicas, on every rank; tensor ranks all hold the same."""
    stages = topology.gather_over_stages(mine)
    return merge(part for stage in stages for part in topology.gather_over_data(stage))


def total(units: Units) -> UnitSums:
    """Add up the sums of all units, as if the model were one."""
    return sum(units.values(), start=UnitSums())


def metrics(units: Units) -> dict[str, float]:
    """Return a training step's metrics: over everything, per parameter kind, and per layer.

    Keys are ``projection/<figure>``, ``projection/kind/<kind>/<figure>`` and
    ``projection/layer/<number>/<figure>``.
    """
    found = {f"projection/{key}": value for key, value in total(units).figures().items()}
    groups = {
        **{f"kind/{kind}": sums for kind, sums in by_kind(units).items()},
        **{f"layer/{layer:03d}": sums for layer, sums in by_layer(units).items()},
    }
    for group, sums in groups.items():
        for key, value in sums.figures().items():
            found[f"projection/{group}/{key}"] = value
    return found


def by_kind(units: Units) -> dict[str, UnitSums]:
    """Sum over layers: all ``self_attn.q_proj.weight`` together, and so on."""
    return _grouped(units, kind_of)


def by_layer(units: Units) -> dict[int, UnitSums]:
    """Sum over the units of each layer; embedding, final norm and head belong to none."""
    return _grouped({name: s for name, s in units.items() if layer_of(name) is not None}, layer_of)


def _grouped(units: Units, label: Callable[[str], Any]) -> dict[Any, UnitSums]:
    found: dict[Any, UnitSums] = {}
    for name, sums in units.items():
        found[label(name)] = found.get(label(name), UnitSums()) + sums
    return dict(sorted(found.items()))
