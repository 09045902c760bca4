"""Jobs for the worker pool that hand the accumulator a broken policy and return its complaint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from proma_megatron.batching.packing import pack
from proma_megatron.config.model import ParallelConfig
from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.distributed.topology import layout
from proma_megatron.learner.gradients import denominator
from proma_megatron.learner.schedule import forward_backward
from proma_megatron.losses.options import UNIT
from proma_megatron.model.build import build_policy
from proma_megatron.model.policy import Policy
from proma_megatron.projection.accumulator import Accumulator
from support.gradients import TINY, VOCAB, random_batch


class Unplugged(Accumulator):
    """An accumulator that forgets one layer when it takes over the others."""

    forgotten: torch.nn.Module

    def enable(self, on: bool) -> None:
        super().enable(on)
        self.forgotten.sink = None  # type: ignore[assignment]


def build(policy: Policy, kind: type[Accumulator] = Accumulator) -> Accumulator:
    return kind(policy.modules, policy.shards, ProjectionConfig(), policy.topology, tied=True)


def complaint(action: Callable[[], object]) -> str:
    """The kind and text of what ``action`` raises, "" if nothing."""
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def build_with_an_uncaptured_norm(device: torch.device, frozen: bool) -> str:
    """Layer 1's first norm is an ordinary module that knows no sink."""
    with layout(ParallelConfig(), device, 0) as topology:
        policy = build_policy(TINY, VOCAB, 64, topology, seed=0)
        decoder: Any = policy.modules[0].decoder
        layer = decoder.layers[1]
        plain = torch.nn.RMSNorm(TINY.hidden_size)
        plain.weight = layer.input_layernorm.weight
        plain.weight.requires_grad_(not frozen)
        layer.input_layernorm = plain
        return complaint(lambda: build(policy))


def run_with_a_forgotten_layer(device: torch.device, layer: int, path: str) -> str:
    """One layer keeps its weight gradient to itself during a projected backward pass."""
    with layout(ParallelConfig(), device, 0) as topology:
        policy = build_policy(TINY, VOCAB, 64, topology, seed=0)
        accumulator = build(policy, Unplugged)
        assert isinstance(accumulator, Unplugged)
        decoder: Any = policy.modules[0].decoder
        accumulator.forgotten = decoder.layers[layer].get_submodule(path)
        batch = random_batch(0, [2, 2])
        microbatches = [
            pack(sequences, index, denominator(batch), device)
            for index, sequences in enumerate(batch)
        ]
        return complaint(
            lambda: forward_backward(policy, microbatches, UNIT, accumulator=accumulator)
        )
