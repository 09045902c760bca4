"""One projected accumulation over given microbatches, on a policy in any layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from proma_megatron.batching.packing import loss_tokens, pack
from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.learner.schedule import forward_backward
from proma_megatron.losses.options import REINFORCE, UNIT
from proma_megatron.model.policy import Policy
from proma_megatron.projection import diagnostics
from proma_megatron.projection.accumulator import Accumulator
from proma_megatron.projection.diagnostics import UnitSums
from proma_megatron.types import Microbatch, TrainingSequence
from proma_megatron.weights.gathering import gather

Batch = Sequence[Sequence[TrainingSequence]]


def denominator(batch: Batch) -> float:
    """Return N: the loss tokens of all microbatches."""
    return float(loss_tokens([sequence for microbatch in batch for sequence in microbatch]))


def replica_share(
    batch: Batch, replica: int, replicas: int, policy: Policy, total: float
) -> list[Microbatch]:
    """Pack the chain of one replica: microbatches ``replica``, ``replica + replicas``, ...

    Sequences without loss tokens, whose gradients are 0, are left out. Empty microbatches fill it
    up to at least one, and to what an interleaved schedule takes.
    """
    topology = policy.topology
    mine = [[s for s in found if s.loss_tokens] for found in batch[replica::replicas]]
    multiple = topology.pipeline.size if topology.virtual_pipeline > 1 else 1
    wanted = max(1, -(-len(mine) // multiple)) * multiple
    mine += [[]] * (wanted - len(mine))
    return [
        pack(sequences, index, total, topology.device, policy.token_multiple)
        for index, sequences in enumerate(mine)
    ]


def accumulate(
    policy: Policy, microbatches: Sequence[Microbatch], projection: ProjectionConfig
) -> dict[str, UnitSums]:
    """Accumulate the gradient in ``main_grad``, reduced over replicas.

    Returns:
        What was projected, by unit, of all stages and replicas.
    """
    if not projection.active:
        forward_backward(policy, microbatches, REINFORCE)
        return {}
    accumulator = Accumulator.of(policy, projection)
    forward_backward(policy, microbatches, UNIT, accumulator=accumulator)
    return diagnostics.gather(accumulator.tally.units(), policy.topology)


def projected_gradients(
    policy: Policy,
    batch: Batch,
    projection: ProjectionConfig,
    *,
    total: float | None = None,
    chains: int = 1,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, torch.Tensor], dict[str, UnitSums]]:
    """Return the unsharded gradient of every Hugging Face tensor (on rank 0; empty elsewhere).

    Args:
        total: N, where ``batch`` is only a part of the minibatch.
        chains: run the chains of so many replicas one after the other and add them, as so many
            replicas would; this layout has one replica then.
    """
    topology = policy.topology
    assert chains == 1 or topology.data.size == 1
    total = denominator(batch) if total is None else total
    added: dict[str, torch.Tensor] = {}
    units: dict[str, UnitSums] = {}
    for chain in range(chains):
        replica = topology.data.rank if chains == 1 else chain
        replicas = topology.data.size if chains == 1 else chains
        microbatches = replica_share(batch, replica, replicas, policy, total)
        units = diagnostics.merge([units, accumulate(policy, microbatches, projection)])
        progress(f"accumulated {len(microbatches)} microbatches a replica")
        found = gather(
            policy.shards,
            lambda shard: shard.parameter.main_grad,  # type: ignore[attr-defined]
            policy.model,
            policy.vocab_size,
            topology,
        )
        added = {name: added[name] + value if added else value for name, value in found.items()}
    return added, units
