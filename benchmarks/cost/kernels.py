"""What the parts of a projected microbatch take by themselves: measured terms of the cost model.

The weights of one transformer layer, as a tensor rank holds them, go through the same code as in
training, without the model around them: G is formed, contracted, and added. Nothing else of a
microbatch is in it (no forward, no autograd, no collective, no Python of the accumulator), so what
a step takes more than the sum of these is what the model misses.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch

from benchmarks.cost.settings import Setting
from proma_megatron.projection.factors.base import Part
from proma_megatron.projection.factors.embedding import Lookup, LookupFactors
from proma_megatron.projection.factors.linear import LinearFactors, SequenceGradients
from proma_megatron.projection.factors.workspace import Workspace
from proma_megatron.projection.rules.proma import solve, solve_vectors
from proma_megatron.types import PackedSequences

ROUNDS = 7
WORKSPACE = 512 * 2**20  # bytes; the default of projection.workspace_mb
UNITS = 7  # of a layer's weights
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Terms:
    """Seconds of one projected microbatch on one rank."""

    plain: float  # the weight-gradient GEMMs of plain accumulation, which are not computed
    form: float  # G of every weight
    products: float  # K, c and |A|^2
    update: float  # A += G coefficients
    lookup: float  # products of an untied embedding, whose rows are added as in plain accumulation
    solves: float  # small problems of all units

    @property
    def extra(self) -> float:
        """What the projection takes more than plain accumulation."""
        return sum(getattr(self, f.name) for f in fields(self)) - 2 * self.plain


def weights_of(setting: Setting) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """(out, in) of a layer's weights and of the embedding, as a tensor rank holds them."""
    model, tensor = setting.shape.model(tied=setting.tied), setting.tensor
    heads = (model.heads + 2 * model.kv_heads) * model.head_dim
    layer = [
        (heads // tensor, model.hidden_size),
        (model.hidden_size, model.heads * model.head_dim // tensor),
        (2 * model.ffn_hidden_size // tensor, model.hidden_size),
        (model.hidden_size, model.ffn_hidden_size // tensor),
    ]
    return layer, (setting.shape.vocabulary // tensor, model.hidden_size)


def measure(setting: Setting, threads: int) -> Terms:
    """Medians of a few rounds, each of which runs every part once, on this process alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        layer, table = weights_of(setting)
        layers = setting.shape.layers
        parts = _medians(_Weights(layer, setting).parts())
        ends = _medians(_Weights([table], setting, tied=setting.tied).parts())
        found = {name: layers * seconds + ends[name] for name, seconds in parts.items()}
        lookup = {"lookup": 0.0} if setting.tied else _medians({"lookup": _lookup(table, setting)})
        solves = _medians({"solves": _solves(setting)})
        return Terms(**found, **lookup, **solves)
    finally:
        torch.set_num_threads(before)


def _medians(parts: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(ROUNDS + 1):
        for name, part in parts.items():
            began = time.perf_counter()
            part()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def _sequences(setting: Setting) -> PackedSequences:
    return PackedSequences.of(
        (setting.tokens,) * setting.sequences, setting.tokens * setting.sequences, CPU
    )


class _Weights:
    """Weights of one group, from plain accumulation to the projected update."""

    def __init__(
        self, shapes: list[tuple[int, int]], setting: Setting, *, tied: bool = False
    ) -> None:
        sequences = _sequences(setting)
        tokens, self.k = sequences.offsets[-1], sequences.count
        self.workspace = Workspace(WORKSPACE, CPU)
        self.accumulated = [torch.ones(shape) for shape in shapes]
        self.factors: list[LinearFactors] = []
        for rows, width in shapes:
            x, dy = torch.randn(tokens, width), torch.randn(tokens, rows)
            lookup = Lookup(torch.randint(rows, (tokens,)), torch.randn(tokens, width))
            self.factors.append(
                LinearFactors(
                    x,
                    dy,
                    sequences,
                    self.workspace,
                    dtype=torch.float32,
                    lookup=lookup if tied else None,
                )
            )
        self.gradients: list[SequenceGradients] = []

    def parts(self) -> dict[str, Callable[[], object]]:
        return {
            "plain": self.plain,
            "form": self.form,
            "products": self.products,
            "update": self.update,
        }

    def plain(self) -> None:
        for factors, accumulated in zip(self.factors, self.accumulated, strict=True):
            # As Megatron does without a fused kernel: into fresh memory, and added from there.
            accumulated.add_(factors.dy.t() @ factors.x)

    def form(self) -> None:
        self.workspace.free()
        self.gradients = [factors.materialize(accumulates=True) for factors in self.factors]

    def products(self) -> None:
        for gradients, accumulated in zip(self.gradients, self.accumulated, strict=True):
            gradients.products([((0, len(accumulated)),)], accumulated)

    def update(self) -> None:
        coefficients = torch.full((self.k,), 1e-6, dtype=torch.float64)
        for gradients, accumulated in zip(self.gradients, self.accumulated, strict=True):
            gradients.update([_whole(accumulated, coefficients)], accumulated)


def _whole(accumulated: torch.Tensor, coefficients: torch.Tensor) -> Part:
    return ((0, len(accumulated)),), coefficients


def _lookup(table: tuple[int, int], setting: Setting) -> Callable[[], object]:
    """Products of an untied embedding; its update is an index_add, with and without projection."""
    sequences = _sequences(setting)
    tokens = sequences.offsets[-1]
    lookup = Lookup(torch.randint(table[0], (tokens,)), torch.randn(tokens, table[1]))
    factors = LookupFactors(lookup, sequences, Workspace(WORKSPACE, CPU))
    accumulated = torch.ones(table)
    return lambda: factors.products([((0, table[0]),)], accumulated)


def _solves(setting: Setting) -> Callable[[], object]:
    """Of all groups, and of the norms at the end of the microbatch."""
    k, model = setting.sequences, setting.shape.model(tied=setting.tied)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    gradients = normal(UNITS, k, 4 * k)
    gram, overlap, advantages = gradients @ gradients.mT, normal(UNITS, k), normal(k)
    norms = 2 * model.layers + 1, model.hidden_size
    heads = 2 * model.layers, model.head_dim
    options = {"shrinkage": 1.0, "bound": 0.5, "cutoff": 1e-5}

    def run() -> None:
        for _ in range(model.layers + 1):
            solve("exact", gram, overlap, advantages, **options)
        for count, length in (norms, heads):
            solve_vectors(
                "exact", vectors[length][:count], whole[length][:count], advantages, **options
            )

    vectors = {n: normal(count, k, n) for count, n in (norms, heads)}
    whole = {n: normal(count, n) for count, n in (norms, heads)}
    return run
