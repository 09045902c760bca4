"""The accumulator: owner of ``main_grad`` during a projected backward pass.

It is the `GradientSink` of the policy's layers. During backward each layer hands it the factors of
its weight gradient; captures of one transformer layer are collected, their K and c are summed over
the tensor-parallel group in one collective, solved together in float64, and applied to
``main_grad``. Each parameter sees its microbatches in order 0..M-1.

Microbatches are told apart by `begin_backward`, which the schedule calls when the backward of a
microbatch reaches this model chunk: under 1F1B forwards run ahead of backwards, and recompute runs
forwards inside backwards, so what the last forward was says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from proma_megatron.config import ProjectionConfig
from proma_megatron.policy.layers import CAPTURED_LAYERS
from proma_megatron.policy.parameters import ParameterShard, Reduction
from proma_megatron.projection.diagnostics import Tally
from proma_megatron.projection.factors import (
    DenseFactors,
    Factors,
    Lookup,
    LookupFactors,
    VectorFactors,
)
from proma_megatron.projection.rules import solve
from proma_megatron.projection.tied import TiedEnds
from proma_megatron.projection.units import Unit, units_of
from proma_megatron.records import Microbatch, Sequences
from proma_megatron.topology import Topology


@dataclass(frozen=True)
class _Capture:
    shard: ParameterShard
    factors: Factors


@dataclass(frozen=True)
class Current:
    """The microbatch whose backward runs on this rank, and in which model chunk."""

    chunk: int
    microbatch: Microbatch


class Accumulator:
    """Projected accumulation over the microbatches of one optimizer step.

    Args:
        shards: every trainable parameter of this rank.
        tied: whether embedding and head are one tensor.

    Raises:
        ValueError: a trainable parameter that no capturing layer claims.
    """

    def __init__(
        self,
        modules: Iterable[torch.nn.Module],
        shards: Iterable[ParameterShard],
        config: ProjectionConfig,
        topology: Topology,
        *,
        tied: bool,
    ) -> None:
        self.config = config
        self.topology = topology
        self.shards = {id(shard.parameter): shard for shard in shards}
        self.layers = [
            layer
            for module in modules
            for layer in module.modules()
            if isinstance(layer, CAPTURED_LAYERS)
        ]
        self._check_claims()
        assert config.rule != "none", "rule 'none' is Megatron's own accumulation"
        self.rule = config.rule
        self.units = {
            key: units_of(shard, config.unit, config.parameters)
            for key, shard in self.shards.items()
        }
        self.tied_table = self._find_tied_table() if tied else None
        self.ends = TiedEnds(topology) if tied and topology.tied_ends is not None else None
        self.tally = Tally()
        self._current: Current | None = None
        self._group: tuple[int, int, int | None] | None = None
        self._pending: list[_Capture] = []
        self._held = 0  # bytes of materialized gradients among the pending
        self._tied_head: tuple[torch.Tensor, torch.Tensor] | None = None
        self._seen: dict[int, int] = {}

    # ------------------------------------------------------------------ set-up

    def _check_claims(self) -> None:
        claimed = {
            id(parameter) for layer in self.layers for parameter in layer.parameters(recurse=False)
        }
        for shard in self.shards.values():
            if shard.parameter.requires_grad and id(shard.parameter) not in claimed:
                raise ValueError(
                    f"no capturing layer claims the trainable parameter {shard.name}; it would be "
                    "trained as if every advantage were 1"
                )

    def _find_tied_table(self) -> ParameterShard | None:
        """The tied tensor as this rank's accumulator sees it: on the last stage if there are two.

        The copy of the first stage stays at 0; Megatron's sum over both ends gives it the result.
        """
        wanted = (
            "embedding.word_embeddings.weight"
            if self.topology.pipeline.size == 1
            else "output_layer.weight"
        )
        return next((s for s in self.shards.values() if s.name == wanted), None)

    def enable(self, on: bool) -> None:
        """Route the layers' weight gradients here, or back to Megatron."""
        for layer in self.layers:
            layer.sink = self if on else None  # type: ignore[assignment]

    # ------------------------------------------------------------------ one optimizer step

    def begin(self) -> None:
        """Start a step: ``main_grad`` is zero and nothing has been seen."""
        self.tally = Tally()
        self._seen = dict.fromkeys(self.shards, 0)
        self._group = None

    def begin_backward(self, chunk: int, microbatch: Microbatch) -> None:
        """The backward pass of ``microbatch`` starts on this model chunk."""
        self._flush()
        self._current = Current(chunk, microbatch)

    @torch.no_grad()
    def finish(self, microbatches: int) -> None:
        """End the step, before gradients are reduced over replicas.

        Raises:
            RuntimeError: a parameter did not see every microbatch; its gradient would be wrong.
        """
        self._flush()
        self._current = None
        if self.ends is not None and self.topology.is_last_stage:
            self._drain_tied(microbatches)
        if self.ends is not None:
            self.ends.wait()
        for key, shard in self.shards.items():
            if self.ends is not None and self.topology.is_first_stage and shard.layer is None:
                continue  # the tied table's first copy: its gradient is made on the last stage
            if self._seen[key] != microbatches:
                raise RuntimeError(
                    f"parameter {shard.name} saw {self._seen[key]} of {microbatches} microbatches "
                    "in the projected backward pass; its layer did not hand over its gradient"
                )

    # ------------------------------------------------------------------ captures (GradientSink)

    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, dy: torch.Tensor
    ) -> None:
        shard, current = self.shards[id(weight)], self._now()
        if self.tied_table is shard:
            self._capture_tied_head(current, x, dy)
            return
        self._enter(shard)
        self._capture(shard, self._dense(shard, current.microbatch.sequences, x, dy))
        if bias is not None:
            gradients = current.microbatch.sequences.indicator(0, dy.shape[0]).to(
                self._dtype(bias)
            ) @ dy.to(self._dtype(bias))
            self._capture(self.shards[id(bias)], VectorFactors(gradients))

    def scale(self, weight: torch.Tensor, x: torch.Tensor, dy: torch.Tensor) -> None:
        shard, current = self.shards[id(weight)], self._now()
        self._enter(shard)
        dtype = self._dtype(weight)
        per_token = (x.to(dtype) * dy.to(dtype)).flatten(1, -2).sum(dim=1)
        tokens = per_token.shape[0]
        # Under sequence parallelism a norm sees this rank's slice of the tokens.
        start = 0 if tokens == current.microbatch.num_tokens else self.topology.tensor.rank * tokens
        gradients = current.microbatch.sequences.indicator(start, tokens).to(dtype) @ per_token
        self._capture(shard, VectorFactors(gradients))

    def embedding(self, weight: torch.Tensor, rows: torch.Tensor, dy: torch.Tensor) -> None:
        shard, current = self.shards[id(weight)], self._now()
        if self.ends is not None:
            self.ends.send(dy)
            return
        self._enter(shard)
        lookup = Lookup(rows, dy.to(self._dtype(weight)))
        if self.tied_table is shard:
            assert self._tied_head is not None, "the head's backward comes before the embedding's"
            x, head_dy = self._tied_head
            self._tied_head = None
            factors: Factors = self._dense(shard, current.microbatch.sequences, x, head_dy, lookup)
        else:
            factors = LookupFactors(lookup, current.microbatch.sequences, self._block_bytes)
        self._capture(shard, factors)

    def _now(self) -> Current:
        assert self._current is not None, "begin_backward comes before captures"
        return self._current

    @staticmethod
    def _dtype(weight: torch.Tensor) -> torch.dtype:
        return weight.main_grad.dtype  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ workspace

    @property
    def _block_bytes(self) -> int:
        """Half of the workspace is for blocks in passing, half for what is kept to the solve."""
        return self.config.workspace_mb * 2**20 // 2

    def _dense(
        self,
        shard: ParameterShard,
        sequences: Sequences,
        x: torch.Tensor,
        dy: torch.Tensor,
        lookup: Lookup | None = None,
    ) -> DenseFactors:
        dtype = self._dtype(shard.parameter)
        size = sequences.count * shard.parameter.numel() * dtype.itemsize
        # With A = 0 nothing is removed: the plain GEMM is the whole update.
        needed = self._projects(shard)
        materialize = needed and self._held + size <= self._block_bytes
        if materialize:
            self._held += size
        return DenseFactors(
            x,
            dy,
            sequences,
            dtype=dtype,
            block_bytes=self._block_bytes,
            materialize=materialize,
            lookup=lookup,
        )

    def _projects(self, shard: ParameterShard) -> bool:
        """Whether this microbatch removes something from this parameter's gradient."""
        key = id(shard.parameter)
        return self._seen[key] > 0 and any(unit.projected for unit in self.units[key])

    # ------------------------------------------------------------------ solving

    def _enter(self, shard: ParameterShard) -> None:
        """Captures of one layer are solved together; another layer's capture closes the group."""
        current = self._now()
        group = (current.chunk, current.microbatch.index, shard.layer)
        if group != self._group:
            self._flush()
            self._group = group

    def _capture(self, shard: ParameterShard, factors: Factors) -> None:
        self._pending.append(_Capture(shard, factors))

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        self._held = 0
        if pending:
            self._solve(pending, self._now().microbatch)

    def _solve(self, captures: list[_Capture], microbatch: Microbatch) -> None:
        """Project what the captured units have accumulated, and add this microbatch."""
        projecting: list[tuple[_Capture, Unit]] = []
        k = microbatch.sequences.count
        for capture in captures:
            key = id(capture.shard.parameter)
            for unit in self.units[key]:
                if unit.projected and self._seen[key] > 0 and k:
                    projecting.append((capture, unit))
                else:
                    self._apply(capture, unit, microbatch.advantages)
            self._seen[key] += 1
        if not projecting:
            return
        gram, overlap, energy = self._reduced_products(projecting, k)
        double = self._dtype(captures[0].shard.parameter) == torch.float64
        solution = solve(
            self.rule,  # type: ignore[arg-type]
            gram,
            overlap,
            microbatch.advantages,
            shrinkage=self.config.shrinkage,
            bound=self.config.bound,
            # Eigenvalues at the rounding noise of K, whose entries are sums in this precision.
            cutoff=1e-11 if double else 1e-5,
        )
        self.tally.add(gram, energy, solution)
        for (capture, unit), coefficients in zip(projecting, solution.coefficients, strict=True):
            self._apply(capture, unit, coefficients)

    def _apply(self, capture: _Capture, unit: Unit, coefficients: torch.Tensor) -> None:
        if unit.rows and len(coefficients):
            capture.factors.update(unit.rows, self._main_grad(capture.shard), coefficients)

    @staticmethod
    def _main_grad(shard: ParameterShard) -> torch.Tensor:
        return shard.parameter.main_grad  # type: ignore[attr-defined]

    def _reduced_products(
        self, projecting: list[tuple[_Capture, Unit]], k: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """K (U, k, k), c (U, k) and |A|^2 (U,) of whole units, from one sum over TP.

        A unit of which each rank holds a slice sends its K, c and |A|^2. A unit of which each rank
        holds a summand sends its vectors: products of sums are not sums of products.
        """
        parts: list[tuple[torch.Tensor, ...]] = []
        for capture, unit in projecting:
            accumulated = self._main_grad(capture.shard)
            if unit.reduction is Reduction.PARTIAL:
                assert isinstance(capture.factors, VectorFactors)
                parts.append((capture.factors.gradients.double(), accumulated.double()))
            else:
                gram, overlap = capture.factors.products(unit.rows, accumulated)
                energy = sum(
                    (accumulated[low:high].double().square().sum() for low, high in unit.rows),
                    start=gram.new_zeros(()),
                )
                parts.append((gram, overlap, energy))
        shared = [
            at
            for at, (_, unit) in enumerate(projecting)
            if unit.reduction is not Reduction.REPLICATED
        ]
        summed = self._sum_over_tensor_group([tensor for at in shared for tensor in parts[at]])
        for at in shared:
            parts[at] = tuple(next(summed) for _ in parts[at])
        grams, overlaps, energies = [], [], []
        for (_, unit), part in zip(projecting, parts, strict=True):
            if unit.reduction is Reduction.PARTIAL:
                gradients, total = part
                part = (gradients @ gradients.T, gradients @ total, total.square().sum())
            grams.append(part[0])
            overlaps.append(part[1])
            energies.append(part[2])
        return torch.stack(grams), torch.stack(overlaps), torch.stack(energies)

    def _sum_over_tensor_group(self, tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The float64 tensors summed over TP, in one collective."""
        if not tensors:
            return iter(())
        whole = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(whole, group=self.topology.tensor.group)
        sizes = [tensor.numel() for tensor in tensors]
        return iter(
            [
                part.view(tensor.shape)
                for part, tensor in zip(whole.split(sizes), tensors, strict=True)
            ]
        )

    # ------------------------------------------------------------------ tied embedding and head

    def _capture_tied_head(self, current: Current, x: torch.Tensor, dy: torch.Tensor) -> None:
        """The head's part of the tied tensor waits for the embedding's: cross terms count."""
        if self.ends is None:
            self._tied_head = (x, dy)
            return
        self._drain_tied(current.microbatch.index - self.ends.lag)
        self.ends.hold(current.microbatch, x, dy)

    def _drain_tied(self, stop: int) -> None:
        """Finish the tied tensor for held microbatches with an index below ``stop``."""
        assert self.ends is not None
        assert self.tied_table is not None
        assert not self._pending, "tied microbatches are finished between groups of captures"
        shard = self.tied_table
        for held in self.ends.ready(stop):
            dtype = self._dtype(shard.parameter)
            rows = self._local_rows(held.microbatch.tokens.flatten())
            lookup = Lookup(rows, self.ends.receive(held, dtype))
            factors = self._dense(shard, held.microbatch.sequences, held.x, held.dy, lookup)
            self._solve([_Capture(shard, factors)], held.microbatch)
            self._held = 0

    def _local_rows(self, tokens: torch.Tensor) -> torch.Tensor:
        assert self.tied_table is not None
        size = self.tied_table.parameter.shape[0]
        local = tokens - self.topology.tensor.rank * size
        return local.masked_fill((local < 0) | (local >= size), -1)
