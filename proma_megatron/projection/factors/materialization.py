"""Whether to keep a weight's sequence gradients until it is solved, or to do without.

Kept (materialized), G serves the products and the update, and goes to memory and back in between.
Streamed, blocks of it are formed, contracted and dropped, and the update is one more
weight-gradient GEMM. So what decides is how long k numbers an entry take to memory and back, and
how long 2 T operations an entry take: sequences longer than so many tokens are kept, whatever the
shape of the weight. The two rates are measured when a run starts. The model is in
docs/evidence/cost.md.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from proma_megatron.files import atomic_write
from proma_megatron.projection.factors.gemm import Gemm

if TYPE_CHECKING:
    from proma_megatron.distributed.topology import Topology

Materialization = Literal["auto", "materialize", "stream"]

# Sequence gradients of smaller weights cost no time worth a choice; and so results of small models
# don't depend on what was measured.
SMALL_BYTES = 2**20

_TRIES = 4
_COPIED = 48 * 2**20  # bytes: more than caches hold
_GEMM = (1024, 512, 1024)  # out, T, in


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second, with the GEMM and in the dtypes of a run."""

    gemm: float  # floating-point operations of a weight-gradient GEMM
    memory: float  # bytes to or from memory
    engine: str = "TorchGemm"  # whose GEMM it was

    @classmethod
    def measure(
        cls, dtype: torch.dtype, device: torch.device, gemm: Gemm, operands: torch.dtype
    ) -> Rates:
        """Measure this machine, the best of a few tries; some 100 ms together on two CPU cores.

        Args:
            dtype: of ``main_grad``.
            operands: dtype that layers hand over.
        """
        rows, tokens, columns = _GEMM
        x = gemm.operand(torch.ones(tokens, columns, dtype=operands, device=device), dtype)
        dy = gemm.operand(torch.ones(tokens, rows, dtype=operands, device=device), dtype)
        weight = torch.zeros(rows, columns, dtype=dtype, device=device)
        source = torch.ones(_COPIED // dtype.itemsize, dtype=dtype, device=device)
        target = torch.empty_like(source)
        product = _seconds(lambda: gemm.accumulate(dy, x, weight), device)
        copy = _seconds(lambda: target.copy_(source), device)
        operations = 2 * rows * tokens * columns
        return cls(operations / product, 2 * _COPIED / copy, type(gemm).__name__)

    @classmethod
    def read(cls, path: Path) -> Rates | None:
        """Read those that `write` left; None where there are none."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # lost, or half written: they are measured again
            return None

    def write(self, path: Path) -> None:
        """Keep them: a run that goes on with others might choose otherwise, and round otherwise."""
        with atomic_write(path) as part:
            part.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    def break_even(self, itemsize: int) -> float:
        """Return how many tokens a sequence has from which on keeping pays."""
        return itemsize * self.gemm / self.memory


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    def timed() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    return min(timed() for _ in range(_TRIES))


def agree_on_rates(
    weights: Iterable[torch.Tensor], topology: Topology, gemm: Gemm, known: Rates | None = None
) -> Rates | None:
    """Share rank 0's with all ranks, or None where no weight of its is worth it; a collective.

    Tensor ranks must choose alike, for what they keep says when they wait for each other. All
    measure at the same time: those of one machine share its memory when it counts, too.

    Args:
        weights: this rank's, with ``main_grad``; all of one dtype.
        gemm: what forms and adds their gradients.
        known: what was measured before, in the same run; of rank 0. With another engine it
            counts for nothing.
    """
    largest = max(weights, key=lambda weight: weight.numel(), default=None)
    (known,) = topology.from_rank_0([known])
    if known is not None and known.engine == type(gemm).__name__:
        return known
    known = None
    if largest is not None:
        grad: torch.Tensor = largest.main_grad  # type: ignore[attr-defined]
        if grad.nbytes >= SMALL_BYTES:
            known = Rates.measure(grad.dtype, grad.device, gemm, largest.dtype)
    (known,) = topology.from_rank_0([known])
    return known


@dataclass(frozen=True)
class MaterializationChoice:
    """What is done with one weight's sequence gradients, and why."""

    materialize: bool
    reason: str


def choose_materialization(
    how: Materialization,
    *,
    entries: int,
    itemsize: int,
    tokens: int,
    slices: int,
    room: int,
    rates: Rates | None,
) -> MaterializationChoice:
    """Choose for one weight and microbatch.

    Args:
        entries: of the weight, on this rank.
        slices: what would be kept of so many entries: k, and one for an accumulated gradient.
        room: bytes that the workspace has left.
        rates: None where nothing was measured; then what fits is kept.
    """
    size = slices * entries * itemsize
    if how == "stream":
        return MaterializationChoice(False, "projection.gradients=stream")
    if size > room:
        return MaterializationChoice(
            False, f"{size / 2**20:.1f} MiB, of which the workspace has {room / 2**20:.1f} left"
        )
    if how == "materialize":
        return MaterializationChoice(True, "projection.gradients=materialize")
    if rates is None or entries * itemsize < SMALL_BYTES:
        return MaterializationChoice(True, "small")
    kept = 1e3 * 2 * size / rates.memory
    again = 1e3 * 2 * tokens * entries / rates.gemm
    return MaterializationChoice(
        kept <= again,
        f"{size / 2**20:.1f} MiB to memory and back take {kept:.2f} ms, "
        f"forming the gradient again {again:.2f} ms",
    )


def describe(choices: Mapping[str, MaterializationChoice], rates: Rates | None) -> list[str]:
    """Describe for a person what was done the last time, by kind of weight, with a reason of it."""
    lines = []
    if rates is not None:
        lines.append(
            f"measured: {rates.gemm / 1e9:,.0f} GFLOP/s in a weight-gradient GEMM, "
            f"{rates.memory / 1e9:,.1f} GB/s to and from memory; in float32 keeping pays from "
            f"{rates.break_even(4):.0f} tokens a sequence on"
        )
    kinds: dict[str, list[MaterializationChoice]] = {}
    for name, choice in choices.items():
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(choice)
    for kind, found in kinds.items():
        kept = [choice for choice in found if choice.materialize]
        streamed = [choice for choice in found if not choice.materialize]
        lines += [
            f"{kind}: {how} {len(some)} of {len(found)} ({some[-1].reason})"
            for how, some in (("materialize", kept), ("stream", streamed))
            if some
        ]
    return lines
