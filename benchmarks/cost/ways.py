"""The ways to accumulate a step that are compared, on one policy of one rank."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from benchmarks.cost.hooks import Hooks
from benchmarks.cost.settings import Setting
from proma_megatron.batching.packing import loss_tokens, pack
from proma_megatron.commands.verify.comparison import relative_error
from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.distributed.topology import Topology
from proma_megatron.learner.schedule import forward_backward
from proma_megatron.losses.options import REINFORCE, UNIT
from proma_megatron.model.build import build_policy
from proma_megatron.model.policy import Policy
from proma_megatron.projection.accumulator import Accumulator
from proma_megatron.projection.units import units_of
from proma_megatron.types import Microbatch, TrainingSequence
from proma_megatron.weights.shards import Reduction

# Gradients of a step, from zeroing them to Megatron's last reduction; no optimizer.
Step = Callable[[Sequence[Microbatch]], object]


def batch(setting: Setting, topology: Topology) -> list[Microbatch]:
    """The microbatches of a step."""
    return drawn(
        setting.tokens,
        setting.sequences,
        setting.microbatches,
        setting.shape.vocabulary,
        topology.device,
    )


def drawn(
    tokens: int,
    sequences: int,
    microbatches: int,
    vocabulary: int,
    device: torch.device,
    multiple: int = 1,
) -> list[Microbatch]:
    """Equal lengths, a first quarter of prompt, random tokens.

    Args:
        multiple: of which microbatches have tokens, padded.
    """
    draw = random.Random(tokens * 1000 + sequences)

    def sequence() -> TrainingSequence:
        return TrainingSequence(
            tokens=tuple(draw.choices(range(vocabulary), k=tokens)),
            loss_mask=tuple(int(at >= tokens // 4) for at in range(tokens)),
            advantage=draw.gauss(0, 1),
            old_logprobs=(0.0,) * tokens,
        )

    found = [[sequence() for _ in range(sequences)] for _ in range(microbatches)]
    total = float(loss_tokens([one for microbatch in found for one in microbatch]))
    packed = [pack(some, m, total, device, multiple) for m, some in enumerate(found)]
    for microbatch in packed:
        assert microbatch.sequences.count == sequences  # made once, not while it is timed
    return packed


def plain(policy: Policy) -> Step:
    """Megatron's own accumulation of the policy loss."""
    return lambda microbatches: forward_backward(policy, microbatches, REINFORCE)


def proma(policy: Policy, config: ProjectionConfig) -> Step:
    """Ours; one accumulator for all steps, as in training."""
    accumulator = Accumulator.of(policy, config)
    return lambda microbatches: forward_backward(
        policy, microbatches, UNIT, accumulator=accumulator
    )


def projected_units(policy: Policy, config: ProjectionConfig) -> int:
    return sum(
        unit.projected
        for shard in policy.shards
        for unit in units_of(shard, config.unit, config.parameters)
    )


def projected_parameters(policy: Policy, config: ProjectionConfig) -> int:
    """d: numbers that are projected, on all tensor ranks together."""
    return sum(
        shard.parameter.numel()
        * (policy.topology.tensor.size if shard.reduction is Reduction.DISJOINT else 1)
        for shard in policy.shards
        if config.parameters == "all" or shard.linear
    )


def disagreement(setting: Setting, topology: Topology, dtype: str = "float64") -> float:
    """How far our gradients of linear weights lie from those of the hooks, for the same problem.

    Returns:
        The largest relative error of a parameter of this rank.
    """
    model = setting.shape.model(tied=setting.tied, dtype=dtype)
    policy = build_policy(model, setting.shape.vocabulary, setting.tokens, topology, seed=0)
    microbatches = batch(setting, topology)
    config = ProjectionConfig(rule="iterative", parameters="linear")
    found: list[list[torch.Tensor]] = []
    for step in (
        proma(policy, config),
        Hooks(policy).step,
        Hooks(policy, by_layer=True).step,
    ):
        step(microbatches)
        found.append(
            [s.parameter.main_grad.clone() for s in policy.shards if s.linear]  # type: ignore[attr-defined]
        )
    ours, *others = found
    return max(
        relative_error(theirs, mine)
        for other in others
        for mine, theirs in zip(ours, other, strict=True)
    )
