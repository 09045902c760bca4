"""The accumulator: owner of ``main_grad`` during a projected backward pass.

It is the `GradientSink` of the policy's layers. During backward each layer hands it the factors of
its weight gradient, and the rule's updater takes from them what it needs. Parameters of one
transformer layer are finished together: one sum over tensor ranks for all of them, and then the
update of ``main_grad``; that of short vectors may wait for the end of the backward pass. The sum is
started with the layer's last capture and waited for at the next layer's first, so that it runs
beside what lies between. Each parameter sees its microbatches in order 0..M-1.

Microbatches are told apart by `begin_backward`, which the schedule calls when the backward of a
microbatch reaches this model chunk: under 1F1B forwards run ahead of backwards, and recompute runs
forwards inside backwards, so what the last forward was says nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate

import torch

from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.distributed.topology import Topology
from proma_megatron.model.capture import Operands, captured_layers
from proma_megatron.model.policy import Policy
from proma_megatron.projection.capture import Capture
from proma_megatron.projection.diagnostics import Tally
from proma_megatron.projection.factors.base import Factors
from proma_megatron.projection.factors.embedding import Lookup, LookupFactors
from proma_megatron.projection.factors.gemm import Gemm, TorchGemm, choose_gemm
from proma_megatron.projection.factors.linear import LinearFactors
from proma_megatron.projection.factors.materialization import (
    Choice,
    Rates,
    agree_on_rates,
    choose,
    describe,
)
from proma_megatron.projection.factors.vector import VectorFactors
from proma_megatron.projection.factors.workspace import Workspace
from proma_megatron.projection.fp8_gate import ValidityGate
from proma_megatron.projection.sizes import kept_slices
from proma_megatron.projection.tied import TiedTable
from proma_megatron.projection.units import check_claims, units_of
from proma_megatron.projection.updaters.registry import make_updater
from proma_megatron.types import Microbatch, Sequences
from proma_megatron.weights.shards import ParameterShard

# Beyond so many bytes, units that wait for the end of the backward pass are solved at once.
LATE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Current:
    """The microbatch whose backward runs on this rank, and in which model chunk."""

    chunk: int
    microbatch: Microbatch


@dataclass(frozen=True)
class Group:
    """Whose captures are finished together."""

    chunk: int
    microbatch: int
    layer: int | None  # None: embedding, final norm and head


def _watched[**P, R](
    method: Callable[Concatenate[Accumulator, P], R],
) -> Callable[Concatenate[Accumulator, P], R]:
    """Make a method, where the accumulator takes over from autograd, one that can be timed."""

    @wraps(method)
    def watched(self: Accumulator, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.watch("projection"):
            return method(self, *args, **kwargs)

    return watched


class Accumulator:
    """Projected accumulation over the microbatches of one optimizer step.

    All ranks make theirs together.

    Args:
        shards: every trainable parameter of this rank.
        tied: whether embedding and head are one tensor.
        rates: what this machine was measured to do; None: measure it now, if that matters.
        gemm: what forms and adds weight gradients (`choose_gemm`); None: torch's.
        gate: what compares FP8 operands with those before FP8, if layers compute in it.

    Attributes:
        choices: what was done with each weight's sequence gradients the last time, and why.
        watch: entered, with the name "projection", for whatever is done here during a backward
            pass; a profiler puts its clock there.

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
        rates: Rates | None = None,
        gemm: Gemm | None = None,
        gate: ValidityGate | None = None,
    ) -> None:
        self.config = config
        self.watch: Callable[[str], AbstractContextManager[Any]] = nullcontext
        self.gate = gate
        self.gemm = gemm or TorchGemm()
        self.topology = topology
        self.shards = {id(shard.parameter): shard for shard in shards}
        self.layers = [layer for module in modules for layer in captured_layers(module)]
        # First, as all ranks take part in it: what one rank refuses, others must not wait for.
        self.rates = agree_on_rates(
            [shard.parameter for shard in self.shards.values()], topology, self.gemm, rates
        )
        check_claims(self.shards.values(), self.layers)
        # Only a linear weight has the two factors whose subspaces are meant.
        parameters = "linear" if config.rule == "subspace" else config.parameters
        self.units = {
            key: units_of(shard, config.unit, parameters) for key, shard in self.shards.items()
        }
        self.tied = TiedTable(topology, self.shards.values()) if tied else None
        self._ends = self.tied.ends if self.tied is not None else None
        dtype = next(iter(self.shards.values())).parameter.dtype
        self.solver = make_updater(config, topology.tensor, dtype)
        self._current: Current | None = None
        self._group_bytes = self._bytes_by_layer()
        self._group: Group | None = None
        self._captured = 0  # parameters of the group
        self._wanted = self._captures_by_layer()
        self.workspace = Workspace(config.workspace_mb * 2**20, topology.device)
        self.choices: dict[str, Choice] = {}
        self._pending: list[Any] = []
        self._started: Any = None  # the group whose sum over tensor ranks is under way
        self._held = 0  # bytes that the pending hold besides the workspace
        self._late: list[Any] = []  # units that wait for the end of the backward pass
        self._late_bytes = 0
        self._seen: dict[int, int] = {}
        self._begun: set[int] = set()  # parameters that something has been added to

    @classmethod
    def of(
        cls, policy: Policy, config: ProjectionConfig, *, rates: Rates | None = None
    ) -> Accumulator:
        """Of a policy, with what its layers and its device ask for."""
        device, dtype = policy.topology.device, policy.config.params_dtype
        gradients = policy.shards[0].parameter.main_grad.dtype  # type: ignore[attr-defined]
        return cls(
            policy.modules,
            policy.shards,
            config,
            policy.topology,
            tied=policy.model.tie_embeddings,
            rates=rates,
            gemm=choose_gemm(policy.backend, device, dtype, gradients),
            gate=ValidityGate(config, dtype) if policy.model.fp8 != "none" else None,
        )

    # ------------------------------------------------------------------ set-up

    def _bytes_by_layer(self) -> dict[int | None, int]:
        """What one sequence's gradients of a group take, of which the head's come before others."""
        found: dict[int | None, int] = {}
        for shard in self.shards.values():
            if shard.layer is not None or self._is_tied(shard):
                size = shard.parameter.numel() * self._dtype(shard.parameter).itemsize
                found[shard.layer] = found.get(shard.layer, 0) + size
        return found

    def _captures_by_layer(self) -> Counter[int]:
        """After how many captures a layer's sum can start: those that no other group joins.

        The first layer's waits for the embedding, if that is captured here.
        """
        wanted = Counter(
            shard.layer
            for shard in self.shards.values()
            if shard.layer is not None and shard.parameter.requires_grad
        )
        names = {shard.name for shard in self.shards.values()}
        embeds = self._ends is None and "embedding.word_embeddings.weight" in names
        if embeds and wanted and self.topology.tensor.size > 1:
            del wanted[min(wanted)]
        return wanted

    @property
    def tally(self) -> Tally:
        """What the rule's figures said in the step that was begun last."""
        return self.solver.tally

    def describe_choices(self) -> list[str]:
        """Return a line for each way in which sequence gradients were formed the last time."""
        return describe(self.choices, self.rates)

    @property
    def in_bfloat16(self) -> bool:
        return self.config.fp8_operands == "bfloat16"

    @property
    def compares(self) -> bool:
        return self.gate is not None and self.gate.armed

    @property
    def compares_now(self) -> bool:
        return self.gate is not None and self.gate.wants(self._now().microbatch)

    def compare(self, weight: torch.Tensor, high: Operands, low: Operands) -> None:
        """Both operands of a weight, before its capture changes what has been accumulated."""
        assert self.gate is not None
        self._enter(self.shards[id(weight)])  # which frees the workspace
        accumulated: torch.Tensor = weight.main_grad  # type: ignore[attr-defined]
        microbatch, units = self._now().microbatch, self.units[id(weight)]
        self.gate.look(microbatch, units, high, low, accumulated, self.workspace)

    def enable(self, on: bool) -> None:
        """Route the layers' weight gradients here, or back to Megatron."""
        for layer in self.layers:
            layer.sink = self if on else None  # type: ignore[assignment]

    # ------------------------------------------------------------------ one optimizer step

    def begin(self) -> None:
        """Start a step: ``main_grad`` is zero and nothing has been seen."""
        self.solver.tally = Tally()
        self._seen = dict.fromkeys(self.shards, 0)
        self._begun.clear()
        # What a backward pass left that was broken off belongs to no step.
        self._pending, self._held, self._group = [], 0, None
        self._started = None
        self._late, self._late_bytes = [], 0
        self.workspace.free()
        if self.tied is not None:
            self.tied.forget()

    def begin_backward(self, chunk: int, microbatch: Microbatch) -> None:
        """The backward pass of ``microbatch`` starts on this model chunk, within autograd."""
        self._current = Current(chunk, microbatch)
        # So that the last group waits for no other microbatch, whose activations come first. This
        # runs in the chunk's own backward, outside of those that recompute starts in its layers.
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)  # type: ignore[attr-defined]

    @_watched
    @torch.no_grad()
    def _end_backward(self) -> None:
        self._flush()
        self._finish_late(self._now().microbatch)
        self.tally.settle()
        self._current = self._group = None

    @_watched
    @torch.no_grad()
    def finish(self, microbatches: int) -> None:
        """End the step, before gradients are reduced over replicas.

        Raises:
            RuntimeError: a parameter did not see every microbatch; its gradient would be wrong.
        """
        assert not self._waits(), "the end of each backward pass finishes its captures"
        if self._ends is not None and self.topology.is_last_stage:
            self._drain_tied(microbatches)
        self.workspace.release()
        if self._ends is not None:
            self._ends.wait()
        for key, shard in self.shards.items():
            if self._ends is not None and self.topology.is_first_stage and shard.layer is None:
                continue  # the tied table's first copy: its gradient is made on the last stage
            if self._seen[key] != microbatches:
                raise RuntimeError(
                    f"parameter {shard.name} saw {self._seen[key]} of {microbatches} microbatches "
                    "in the projected backward pass; its layer did not hand over its gradient"
                )

    # ------------------------------------------------------------------ captures (GradientSink)

    @_watched
    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, dy: torch.Tensor
    ) -> None:
        shard, current = self.shards[id(weight)], self._now()
        if self._is_tied(shard):
            self._hold_tied_head(current.microbatch, x, dy)
            return
        self._enter(shard)
        factors = self._dense(shard, current.microbatch.sequences, x, dy)
        self._capture(shard, factors, current.microbatch)
        if bias is not None:
            dtype = self._dtype(bias)
            indicator = current.microbatch.sequences.indicator(0, dy.shape[0], dtype)
            self._capture(
                self.shards[id(bias)], VectorFactors(indicator @ dy.to(dtype)), current.microbatch
            )

    @_watched
    def scale(self, weight: torch.Tensor, x: torch.Tensor, dy: torch.Tensor) -> None:
        shard, current = self.shards[id(weight)], self._now()
        self._enter(shard)
        dtype = self._dtype(weight)
        per_token = (x.to(dtype) * dy.to(dtype)).flatten(1, -2).sum(dim=1)
        tokens = per_token.shape[0]
        # Under sequence parallelism a norm sees this rank's slice of the tokens.
        start = 0 if tokens == current.microbatch.num_tokens else self.topology.tensor.rank * tokens
        indicator = current.microbatch.sequences.indicator(start, tokens, dtype)
        self._capture(shard, VectorFactors(indicator @ per_token), current.microbatch)

    @_watched
    def embedding(self, weight: torch.Tensor, rows: torch.Tensor, dy: torch.Tensor) -> None:
        shard, current = self.shards[id(weight)], self._now()
        if self._ends is not None:
            self._ends.send(dy)
            return
        self._enter(shard)
        lookup = Lookup(rows, dy.to(self._dtype(weight)))
        if self.tied is not None and self.tied.shard is shard:
            head = self.tied.pop()
            factors: Factors = self._dense(
                shard, current.microbatch.sequences, head.x, head.dy, lookup
            )
        else:
            factors = LookupFactors(lookup, current.microbatch.sequences, self.workspace)
        self._capture(shard, factors, current.microbatch)

    def _now(self) -> Current:
        assert self._current is not None, "begin_backward comes before captures"
        return self._current

    @staticmethod
    def _dtype(weight: torch.Tensor) -> torch.dtype:
        return weight.main_grad.dtype  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ factors

    def _dense(
        self,
        shard: ParameterShard,
        sequences: Sequences,
        x: torch.Tensor,
        dy: torch.Tensor,
        lookup: Lookup | None = None,
    ) -> Factors:
        dtype = self._dtype(shard.parameter)
        factors = LinearFactors(
            x, dy, sequences, self.workspace, dtype=dtype, lookup=lookup, gemm=self.gemm
        )
        if not self._asks_for_gradients(shard) or not sequences.count:
            return factors
        choice = choose(
            self.config.gradients,
            entries=shard.parameter.numel(),
            itemsize=dtype.itemsize,
            tokens=sequences.offsets[-1],
            slices=kept_slices(sequences.count, accumulates=self.solver.accumulates),
            room=self.workspace.half - self.workspace.held,
            rates=self.rates,
        )
        self.choices[shard.name] = choice
        if not choice.materialize:
            return factors
        return factors.materialize(accumulates=self.solver.accumulates)

    def _asks_for_gradients(self, shard: ParameterShard) -> bool:
        """Whether this microbatch's sequence gradients of a weight are needed one by one."""
        key = id(shard.parameter)
        projected = any(unit.projected for unit in self.units[key])
        return projected and self.solver.asks_for_gradients(first=key not in self._begun)

    # ------------------------------------------------------------------ groups

    def _enter(self, shard: ParameterShard) -> None:
        """Captures of one layer are finished together; another layer's capture closes the group."""
        current = self._now()
        group = Group(current.chunk, current.microbatch.index, shard.layer)
        if group == self._group:
            return
        if not self._joins(group, current.microbatch.sequences.count):
            self._flush()
        self._group, self._captured = group, 0

    def _joins(self, group: Group, sequences: int) -> bool:
        """Whether what is pending can wait for this group, and save a sum over tensor ranks.

        The final norm and the head do for the last layer, the first layer for the embedding, if the
        workspace has room for both. Tensor ranks have shards of the same shapes, and so agree.
        """
        before = self._group
        if self.topology.tensor.size == 1 or before is None or not self._pending:
            return False
        if (before.chunk, before.microbatch) != (group.chunk, group.microbatch):
            return False
        if None not in (before.layer, group.layer):
            return False
        slices = kept_slices(sequences, accumulates=self.solver.accumulates)
        size = slices * self._group_bytes.get(group.layer, 0)
        return self._held + self.workspace.held + size <= self.workspace.half

    def _capture(
        self, shard: ParameterShard, factors: Factors | VectorFactors, microbatch: Microbatch
    ) -> None:
        key = id(shard.parameter)
        capture = Capture(shard, self.units[key], factors, first=key not in self._begun)
        self._seen[key] += 1
        if microbatch.sequences.count:
            self._begun.add(key)
        waiting = self.solver.take(capture, microbatch)
        if waiting:
            self._pending += waiting
            self._held += factors.nbytes
        self._captured += 1
        if shard.layer is not None and self._captured == self._wanted.get(shard.layer):
            self._start()

    def _waits(self) -> bool:
        """Whether anything of a backward pass is not finished."""
        return bool(self._pending or self._late) or self._started is not None

    def _start(self) -> None:
        """Start the sum over tensor ranks of what is pending; nobody waits for it here."""
        if self._pending:
            assert self._started is None, "one group after the other"
            self._started, self._pending = self.solver.start(self._pending), []

    def _flush(self) -> None:
        if self._pending or self._started is not None:
            self._finish(self._now().microbatch)

    def _finish(self, microbatch: Microbatch) -> None:
        self._start()
        started, self._started = self._started, None
        if started is not None:
            late = self.solver.finish(started, microbatch)
            self._late += late
            self._late_bytes += sum(found.nbytes for found in late)
        del started
        self._held = 0
        self.workspace.free()
        if self._late_bytes > LATE_BYTES:
            self._finish_late(microbatch)

    def _finish_late(self, microbatch: Microbatch) -> None:
        late, self._late, self._late_bytes = self._late, [], 0
        if late:
            self.solver.finish_late(late, microbatch)

    # ------------------------------------------------------------------ tied embedding and head

    def _is_tied(self, shard: ParameterShard) -> bool:
        return self.tied is not None and self.tied.shard is shard

    def _hold_tied_head(self, microbatch: Microbatch, x: torch.Tensor, dy: torch.Tensor) -> None:
        """The head's part of the tied tensor waits for the embedding's."""
        assert self.tied is not None
        if self.tied.ends is not None:
            self._drain_tied(microbatch.index - self.tied.ends.lag)
        self.tied.hold(microbatch, x, dy)

    def _drain_tied(self, stop: int) -> None:
        """Finish the tied tensor for held microbatches with an index below ``stop``."""
        assert self.tied is not None
        assert self.tied.shard is not None
        assert not self._waits(), "tied microbatches are finished between others"
        shard = self.tied.shard
        for held in self.tied.drain(stop):
            lookup = self.tied.receive(held)
            factors = self._dense(shard, held.microbatch.sequences, held.x, held.dy, lookup)
            self._capture(shard, factors, held.microbatch)
            del factors  # the workspace may grow before the next ones come
            self._finish(held.microbatch)
