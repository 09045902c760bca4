"""Jobs for the worker pool: policies of Hugging Face directories and of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from proma_megatron.batching.packing import pack
from proma_megatron.checkpoints.loading import load_policy
from proma_megatron.config.loading import validate_config
from proma_megatron.config.run import RunConfig
from proma_megatron.distributed.topology import layout
from proma_megatron.learner.schedule import evaluate_logprobs
from proma_megatron.model.policy import Policy
from proma_megatron.types import Microbatch, TrainingSequence
from proma_megatron.weights import huggingface
from proma_megatron.weights.gathering import gather

Layout = dict[str, object]


def run_config(path: Path | None, parallel: Layout, **model: object) -> RunConfig:
    tree = {"name": "test", "model": {"path": path, "dtype": "float64", **model}}
    return validate_config({**tree, "parallel": parallel})


@dataclass(frozen=True)
class Read:
    """What one rank saw of a directory."""

    logits: list[torch.Tensor] | None  # (L, V) of each sequence, on the last stage
    bytes_read: int  # of weights
    largest: int  # bytes of one slice
    held: int  # bytes of this rank's parameters, vocabulary padding apart


def logits_of(
    device: torch.device, path: Path, parallel: Layout, sequences: Sequence[list[int]]
) -> Read:
    """Logits of the packed sequences, and what reading the weights took."""
    config = run_config(path, parallel)
    read = largest = 0
    narrow = huggingface.TensorSlices.narrow

    def counting(
        self: huggingface.TensorSlices, axis: int, start: int, length: int
    ) -> torch.Tensor:
        nonlocal read, largest
        found = narrow(self, axis, start, length)
        read, largest = read + found.nbytes, max(largest, found.nbytes)
        return found

    with layout(config.parallel, device, 0) as topology:
        huggingface.TensorSlices.narrow = counting
        try:
            policy = load_policy(config, 0, None, topology)
        finally:
            huggingface.TensorSlices.narrow = narrow
        held = sum(
            run.length * shard.parameter.numel() // shard.parameter.shape[shard.axis]
            for shard in policy.shards
            for run in shard.runs
        )
        return Read(_logits(policy, sequences), read, largest, 8 * held)


def _microbatch(policy: Policy, sequences: Sequence[list[int]]) -> Microbatch:
    topology = policy.topology
    items = [
        TrainingSequence(tuple(ids), (0,) + (1,) * (len(ids) - 1), 1.0, (0.0,) * len(ids))
        for ids in sequences
    ]
    multiple = policy.token_multiple
    return pack(items, 0, 1.0, topology.device, multiple)


def _logits(policy: Policy, sequences: Sequence[list[int]]) -> list[torch.Tensor] | None:
    """Whole rows of logits, put together from the columns of the tensor ranks."""
    from proma_megatron.learner import schedule

    topology, found = policy.topology, []
    microbatch = _microbatch(policy, sequences)

    def step(_: Microbatch, __: int, output: torch.Tensor) -> tuple[torch.Tensor, object]:
        def loss(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, object]]:
            columns = [torch.empty_like(logits[0]) for _ in range(topology.tensor.size)]
            dist.all_gather(columns, logits[0].contiguous(), group=topology.tensor.group)
            found.append(torch.cat(columns, dim=1)[:, : policy.vocab_size])
            return logits.sum(), torch.zeros((), dtype=torch.int), {}

        return output, loss

    with torch.no_grad():
        # Interleaved stages take as many microbatches as there are stages, or a multiple.
        again = [microbatch] * topology.pipeline.size
        schedule._run(policy, again, step, forward_only=True)
    if not found:
        return None
    lengths = list(microbatch.lengths)
    return list(found[0][: sum(lengths)].split(lengths))


def logprobs_of(
    device: torch.device, run: Path, parallel: Layout, sequences: Sequence[list[int]]
) -> torch.Tensor | None:
    """The trainer's log-probabilities of each next token, from a run's newest checkpoint."""
    from proma_megatron.runs.policies import open_policy

    changes = [f"parallel.{key}={value}" for key, value in parallel.items()]
    saved = open_policy(run, changes)
    with layout(saved.config.parallel, device, 0) as topology:
        policy = load_policy(saved.config, 0, saved.checkpoint, topology)
        microbatch = _microbatch(policy, sequences)
        found = evaluate_logprobs(policy, [microbatch])
        return None if found is None else found[0][microbatch.loss_mask > 0]


def weights_of(device: torch.device, path: Path, parallel: Layout) -> dict[str, torch.Tensor]:
    """What a policy of a directory holds, put together again."""
    config = run_config(path, parallel, dtype="bfloat16")
    with layout(config.parallel, device, 0) as topology:
        policy = load_policy(config, 0, None, topology)
        return gather(
            policy.shards, lambda s: s.parameter, policy.model, policy.vocab_size, topology
        )
