"""Jobs for the worker pool: log-probabilities from vocabulary-parallel logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from proma_megatron.config.model import ParallelConfig
from proma_megatron.distributed.topology import layout
from proma_megatron.model import logprobs as module


@dataclass(frozen=True)
class Scored:
    """What one rank computed."""

    logprobs: torch.Tensor  # (T,)
    entropy: torch.Tensor  # (T,)
    grad: torch.Tensor  # (T, V_padded / tp)
    logits_untouched: bool


def score(
    device: torch.device,
    tensor: int,
    logits: torch.Tensor,
    labels: torch.Tensor,
    upstream: torch.Tensor,
    upstream_entropy: torch.Tensor | None,
    vocab_size: int,
    temperature: float,
    chunk: int,
) -> Scored:
    """Values and gradient on this rank's columns of (T, V_padded) logits, in chunks of tokens."""
    with layout(ParallelConfig(tensor=tensor), device, seed=0) as topology:
        width = logits.shape[1] // tensor
        columns = slice(topology.tensor.rank * width, (topology.tensor.rank + 1) * width)
        before = logits[:, columns].to(device)
        local = before.clone().requires_grad_()
        default, module.CHUNK = module.CHUNK, chunk
        try:
            logprobs, entropy = module.vocab_parallel_logprobs(
                local, labels.to(device), vocab_size, topology, temperature
            )
            total = (logprobs * upstream.to(logprobs)).sum()
            if upstream_entropy is not None:
                total = total + (entropy * upstream_entropy.to(entropy)).sum()
            total.backward()
        finally:
            module.CHUNK = default
        assert local.grad is not None
        return Scored(
            logprobs.detach().cpu(),
            entropy.detach().cpu(),
            local.grad.cpu(),
            torch.equal(local.detach(), before),
        )
