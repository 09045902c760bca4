"""The accumulator: owner of ``main_grad`` during a projected backward pass.

It is the `GradientSink` of the policy's layers. During backward each layer hands it the factors of
its weight gradient, and the rule's updater takes from them what it needs, a group of parameters
after the other (`grouping`). Each parameter sees its microbatches in order 0..M-1.

Microbatches are told apart by `begin_backward`, which the schedule calls when the backward of a
microbatch reaches this model chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
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
    MaterializationChoice,
    Rates,
    agree_on_rates,
    choose_materialization,
    describe,
)
from proma_megatron.projection.factors.vector import VectorFactors
from proma_megatron.projection.factors.workspace import Workspace
from proma_megatron.projection.fp8_gate import FP8Gate
from proma_megatron.projection.grouping import CaptureGroups
from proma_megatron.projection.sizes import kept_slices
from proma_megatron.projection.tied import TiedTable
from proma_megatron.projection.units import check_claims, units_of
from proma_megatron.projection.updaters.registry import make_updater
from proma_megatron.types import Microbatch, PackedSequences
from proma_megatron.weights.shards import ParameterShard


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
        fp8: whether layers compute in FP8, and hand over operands of both kinds to be compared.

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
        fp8: bool = False,
    ) -> None:
        self.config = config
        self.watch: Callable[[str], AbstractContextManager[Any]] = nullcontext
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
        parameters = "linear" if config.by_subspaces else config.parameters
        self.units = {
            key: units_of(shard, config.unit, parameters) for key, shard in self.shards.items()
        }
        self.tied = TiedTable(topology, self.shards.values()) if tied else None
        self._ends = self.tied.ends if self.tied is not None else None
        dtype = next(iter(self.shards.values())).parameter.dtype
        self.updater = make_updater(config, topology.tensor, dtype)
        self.gate = FP8Gate(config, self.updater.solve) if fp8 else None
        self.workspace = Workspace(config.workspace_mb * 2**20, topology.device)
        self.groups = CaptureGroups(
            self.updater, topology.tensor, self.workspace, self.shards.values(), self.tied
        )
        self.choices: dict[str, MaterializationChoice] = {}
        self._seen: dict[int, int] = {}
        self._begun: set[int] = set()  # parameters that something has been added to

    @classmethod
    def of(
        cls, policy: Policy, config: ProjectionConfig, *, rates: Rates | None = None
    ) -> Accumulator:
        """Make the accumulator of a policy, with what its layers and its device ask for."""
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
            fp8=policy.model.fp8 != "none",
        )

    @property
    def tally(self) -> Tally:
        """What the rule's figures said in the step that was begun last."""
        return self.updater.tally

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
        return self.gate is not None and self.gate.wants(self.groups.microbatch)

    def compare(self, weight: torch.Tensor, high: Operands, low: Operands) -> None:
        """Compare both operands of a weight, before its capture changes what is accumulated."""
        assert self.gate is not None
        self.groups.enter(self.shards[id(weight)])  # which frees the workspace
        accumulated: torch.Tensor = weight.main_grad  # type: ignore[attr-defined]
        microbatch, units = self.groups.microbatch, self.units[id(weight)]
        self.gate.look(microbatch, units, high, low, accumulated, self.workspace)

    def enable(self, on: bool) -> None:
        """Route the layers' weight gradients here, or back to Megatron."""
        for layer in self.layers:
            layer.sink = self if on else None  # type: ignore[assignment]

    # ------------------------------------------------------------------ one optimizer step

    def begin(self) -> None:
        """Start a step: ``main_grad`` is zero and nothing has been seen."""
        self.updater.tally = Tally()
        self._seen = dict.fromkeys(self.shards, 0)
        self._begun.clear()
        self.groups.forget()
        if self.tied is not None:
            self.tied.forget()

    def begin_backward(self, chunk: int, microbatch: Microbatch) -> None:
        """Take note that a microbatch's backward starts on this model chunk, within autograd."""
        self.groups.begin_backward(chunk, microbatch)
        # So that the last group waits for no other microbatch, whose activations come first. This
        # runs in the chunk's own backward, outside of those that recompute starts in its layers.
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)  # type: ignore[attr-defined]

    @_watched
    @torch.no_grad()
    def _end_backward(self) -> None:
        self.groups.end_backward()
        self.tally.settle()

    @_watched
    @torch.no_grad()
    def finish(self, microbatches: int) -> None:
        """End the step, before gradients are reduced over replicas.

        Raises:
            RuntimeError: a parameter did not see every microbatch; its gradient would be wrong.
        """
        assert not self.groups.waiting, "the end of each backward pass finishes its captures"
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
        shard, microbatch = self.shards[id(weight)], self.groups.microbatch
        if self._is_tied(shard):
            self._hold_tied_head(microbatch, x, dy)
            return
        self.groups.enter(shard)
        factors = self._dense(shard, microbatch.sequences, x, dy)
        self._capture(shard, factors, microbatch)
        if bias is not None:
            dtype = self._dtype(bias)
            indicator = microbatch.sequences.indicator(0, dy.shape[0], dtype)
            self._capture(
                self.shards[id(bias)], VectorFactors(indicator @ dy.to(dtype)), microbatch
            )

    @_watched
    def scale(self, weight: torch.Tensor, x: torch.Tensor, dy: torch.Tensor) -> None:
        shard, microbatch = self.shards[id(weight)], self.groups.microbatch
        self.groups.enter(shard)
        dtype = self._dtype(weight)
        per_token = (x.to(dtype) * dy.to(dtype)).flatten(1, -2).sum(dim=1)
        tokens = per_token.shape[0]
        # Under sequence parallelism a norm sees this rank's slice of the tokens.
        start = 0 if tokens == microbatch.num_tokens else self.topology.tensor.rank * tokens
        indicator = microbatch.sequences.indicator(start, tokens, dtype)
        self._capture(shard, VectorFactors(indicator @ per_token), microbatch)

    @_watched
    def embedding(self, weight: torch.Tensor, rows: torch.Tensor, dy: torch.Tensor) -> None:
        shard, microbatch = self.shards[id(weight)], self.groups.microbatch
        if self._ends is not None:
            self._ends.send(dy)
            return
        self.groups.enter(shard)
        lookup = Lookup(rows, dy.to(self._dtype(weight)))
        if self.tied is not None and self.tied.shard is shard:
            head = self.tied.pop()
            factors: Factors = self._dense(shard, microbatch.sequences, head.x, head.dy, lookup)
        else:
            factors = LookupFactors(lookup, microbatch.sequences, self.workspace)
        self._capture(shard, factors, microbatch)

    @staticmethod
    def _dtype(weight: torch.Tensor) -> torch.dtype:
        return weight.main_grad.dtype  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ factors

    def _dense(
        self,
        shard: ParameterShard,
        sequences: PackedSequences,
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
        choice = choose_materialization(
            self.config.gradients,
            entries=shard.parameter.numel(),
            itemsize=dtype.itemsize,
            tokens=sequences.offsets[-1],
            slices=kept_slices(sequences.count, accumulates=self.updater.accumulates),
            room=self.workspace.half - self.workspace.held,
            rates=self.rates,
        )
        self.choices[shard.name] = choice
        if not choice.materialize:
            return factors
        return factors.materialize(accumulates=self.updater.accumulates)

    def _asks_for_gradients(self, shard: ParameterShard) -> bool:
        """Tell whether this microbatch's sequence gradients of a weight are needed one by one."""
        key = id(shard.parameter)
        projected = any(unit.projected for unit in self.units[key])
        return projected and self.updater.asks_for_gradients(first=key not in self._begun)

    def _capture(
        self, shard: ParameterShard, factors: Factors | VectorFactors, microbatch: Microbatch
    ) -> None:
        key = id(shard.parameter)
        capture = Capture(shard, self.units[key], factors, first=key not in self._begun)
        self._seen[key] += 1
        if microbatch.sequences.count:
            self._begun.add(key)
        self.groups.add(capture, microbatch)

    # ------------------------------------------------------------------ tied embedding and head

    def _is_tied(self, shard: ParameterShard) -> bool:
        return self.tied is not None and self.tied.shard is shard

    def _hold_tied_head(self, microbatch: Microbatch, x: torch.Tensor, dy: torch.Tensor) -> None:
        """Keep the head's part of the tied tensor, which waits for the embedding's."""
        assert self.tied is not None
        if self.tied.ends is not None:
            self._drain_tied(microbatch.index - self.tied.ends.lag)
        self.tied.hold(microbatch, x, dy)

    def _drain_tied(self, stop: int) -> None:
        """Finish the tied tensor for held microbatches with an index below ``stop``."""
        assert self.tied is not None
        assert self.tied.shard is not None
        assert not self.groups.waiting, "tied microbatches are finished between others"
        shard = self.tied.shard
        for held in self.tied.drain(stop):
            lookup = self.tied.receive(held)
            factors = self._dense(shard, held.microbatch.sequences, held.x, held.dy, lookup)
            self._capture(shard, factors, held.microbatch)
            del factors  # the workspace may grow before the next ones come
            self.groups.finish(held.microbatch)
