"""The projection as hooks on an ordinary backward, for comparison: PROMA without this project.

Written from the paper's description (arXiv:2601.10498, figures 1 and 3 and section 3), in the style
of its published code. Autograd computes every weight gradient as ever. Hooks see what goes into
each linear module and the gradient of what comes out, form the full gradient of every sequence in
a Python loop, normalize them, and project an accumulated gradient of their own by two sweeps over
them, with the bound that the paper's experiments had.

The published code clones inputs and frees a module's gradients within its hook. Here inputs are not
cloned, and gradients are kept until the microbatch's backward is over, or freed with `by_layer`.
The tied head, which is an embedding here, has no hooks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from proma_megatron.learner.schedule import forward_backward
from proma_megatron.losses.options import UNIT
from proma_megatron.model.policy import Policy
from proma_megatron.projection.units import Unit, units_of
from proma_megatron.types import Microbatch
from proma_megatron.weights.shards import ParameterShard, Reduction

SWEEPS, BOUND = 2, 0.5


@dataclass
class Linear:
    """A linear module that has hooks, its units, and what they accumulate in one step."""

    module: torch.nn.Module
    shard: ParameterShard
    units: tuple[Unit, ...]
    x: torch.Tensor | None = None  # (T, in) of the forward that ran last
    accumulated: dict[str, torch.Tensor] = field(default_factory=dict)  # by unit: (rows, in)
    seen: int = 0  # microbatches whose backward has passed


class Hooks:
    """Projected accumulation of linear weights by hooks: rule `iterative`, bound 0.5.

    Gradients of other parameters are those of the unit losses, as if every advantage were 1.

    Args:
        by_layer: project each module within its hook. Otherwise sequence gradients are kept until
            the backward of the microbatch is over.
    """

    def __init__(self, policy: Policy, *, by_layer: bool = False) -> None:
        assert policy.topology.pipeline.size == 1, "backwards must come in the order of forwards"
        self.policy = policy
        self.by_layer = by_layer
        modules = {
            id(module.weight): module
            for chunk in policy.modules
            for module in chunk.modules()
            if isinstance(getattr(module, "weight", None), torch.nn.Parameter)
        }
        self.linears = [
            Linear(modules[id(shard.parameter)], shard, units_of(shard, "huggingface", "linear"))
            for shard in policy.shards
            if shard.linear
        ]
        self._microbatches: Sequence[Microbatch] = ()
        self._kept: list[tuple[Linear, Unit, list[torch.Tensor], Microbatch]] = []
        self._waiting = 0  # modules whose sequence gradients are kept

    @property
    def units(self) -> int:
        return sum(len(linear.units) for linear in self.linears)

    def step(self, microbatches: Sequence[Microbatch]) -> None:
        """The gradient of a step in ``main_grad`` of the linear weights."""
        self._microbatches = microbatches
        with self._installed():
            forward_backward(self.policy, microbatches, UNIT)
        for linear in self.linears:
            for unit in linear.units:
                at = 0
                for start, stop in unit.rows:
                    part = linear.accumulated[unit.name][at : at + stop - start]
                    linear.shard.parameter.main_grad[start:stop] = part  # type: ignore[attr-defined]
                    at += stop - start
            linear.accumulated, linear.seen, linear.x = {}, 0, None

    @contextlib.contextmanager
    def _installed(self) -> Iterator[None]:
        """Hooks in place; modules without any run as in the other ways."""
        handles = []
        for linear in self.linears:
            handles.append(linear.module.register_forward_hook(partial(self._forward, linear)))
            handles.append(
                linear.module.register_full_backward_hook(partial(self._backward, linear))
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _forward(self, linear: Linear, module: Any, inputs: Any, output: Any) -> None:
        linear.x = inputs[0].detach().flatten(0, -2)

    @torch.no_grad()
    def _backward(self, linear: Linear, module: Any, grad_input: Any, grad_output: Any) -> None:
        assert linear.x is not None
        microbatch = self._microbatches[linear.seen]
        linear.seen += 1
        dtype = torch.promote_types(linear.x.dtype, torch.float32)
        x, dy = linear.x.to(dtype), grad_output[0].flatten(0, -2).to(dtype)
        for unit in linear.units:
            # A tensor rank may hold nothing of a unit, and takes part in its sums all the same.
            parts = [dy[:, start:stop] for start, stop in unit.rows] or [dy[:, :0]]
            columns = torch.cat(parts, dim=1)
            gradients = [
                columns[low:high].T @ x[low:high]
                for low, high in pairwise(microbatch.sequences.offsets)
            ]
            if self.by_layer:
                self._project(linear, unit, gradients, microbatch)
            else:
                self._kept.append((linear, unit, gradients, microbatch))
        self._waiting += 1
        if self._waiting == len(self.linears):
            self._waiting, kept, self._kept = 0, self._kept, []
            for found in kept:
                self._project(*found)

    def _project(
        self,
        linear: Linear,
        unit: Unit,
        gradients: list[torch.Tensor],
        microbatch: Microbatch,
    ) -> None:
        """``A <- A - projection + P`` of one unit."""
        policy_gradient = torch.zeros_like(gradients[0])
        for advantage, gradient in zip(microbatch.advantages, gradients, strict=True):
            policy_gradient += advantage * gradient
        before = linear.accumulated.get(unit.name)
        if before is None:
            linear.accumulated[unit.name] = policy_gradient
            return
        removed = before - self._complement(unit, before, gradients)
        norms = torch.stack([removed.norm(), policy_gradient.norm()])
        size, bound = self._sum(unit, norms.square()).sqrt().tolist()
        if size > BOUND * bound:
            removed *= BOUND * bound / size
        linear.accumulated[unit.name] = before - removed + policy_gradient

    def _complement(
        self, unit: Unit, accumulated: torch.Tensor, gradients: list[torch.Tensor]
    ) -> torch.Tensor:
        """``accumulated`` without its parts along each sequence's gradient, one after the other."""
        norms = self._sum(unit, torch.stack([g.norm().square() for g in gradients])).sqrt()
        directions = [
            (g / norm).flatten() for g, norm in zip(gradients, norms, strict=True) if norm > 0
        ]
        left = accumulated.flatten().clone()
        for _ in range(SWEEPS):
            for u in directions:
                left -= self._sum(unit, torch.dot(left, u)) * u
        return left.view_as(accumulated)

    def _sum(self, unit: Unit, products: torch.Tensor) -> torch.Tensor:
        """Of the entries of all tensor ranks."""
        if self.policy.topology.tensor.size > 1 and unit.reduction is not Reduction.REPLICATED:
            dist.all_reduce(products, group=self.policy.topology.tensor.group)
        return products
