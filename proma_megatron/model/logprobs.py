"""Log-probabilities and entropy from vocabulary-parallel logits, without gathering them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from proma_megatron.config.constants import LOGPROB_CHUNK as CHUNK
from proma_megatron.distributed.topology import Topology


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        first: int,
        valid: int,
        temperature: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [
            _chunk_forward(rows, targets, first, valid, temperature, group)
            for rows, targets in zip(logits.split(CHUNK), labels.split(CHUNK), strict=True)
        ]
        logprobs, entropy, log_z = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(logits, labels, log_z, entropy)
        ctx.first, ctx.valid, ctx.temperature = first, valid, temperature
        ctx.set_materialize_grads(False)  # an output without gradient costs nothing in backward
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Differentiate, with p = softmax(z), z = logits / temperature and p's entropy H:

        d log p_label / dz_j = [j is label] - p_j,  dH / dz_j = -p_j (log p_j + H).

        Normalizer and H are over the whole vocabulary already: no rank asks another one.
        """
        for_logprobs, for_entropy = grads
        logits, labels, log_z, entropy = ctx.saved_tensors
        if for_logprobs is None and for_entropy is None:
            return (None,) * 6
        grad = torch.empty_like(logits)
        for start in range(0, len(logits), CHUNK):
            rows = slice(start, start + CHUNK)
            wide = _wide(logits[rows], ctx.valid, ctx.temperature)
            part = wide - log_z[rows, None]
            by_entropy = None
            if for_entropy is not None:
                scale = for_entropy[rows, None] / ctx.temperature
                by_entropy = _entropy_gradient(part, entropy[rows, None], scale)
            if for_logprobs is None:
                assert by_entropy is not None
                grad[rows] = by_entropy
                continue
            scale = for_logprobs[rows, None] / ctx.temperature
            part.exp_().mul_(-scale)
            owned, local = _owned(labels[rows], ctx.first, logits.shape[1])
            part.scatter_add_(1, local[:, None], scale * owned[:, None])
            grad[rows] = part if by_entropy is None else part.add_(by_entropy)
        return grad, None, None, None, None, None


def _entropy_gradient(
    log_p: torch.Tensor, entropy: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Return ``-scale p (log p + H)`` (n, V/tp), 0 in padding's columns; H and scale are (n, 1)."""
    # 0 * -inf of the padding columns must count as 0, so p is multiplied before anything grows.
    finite = log_p.clamp(min=torch.finfo(log_p.dtype).min)
    return finite.add_(entropy).mul_(log_p.exp()).mul_(-scale)


def _wide(logits: torch.Tensor, valid: int, temperature: float) -> torch.Tensor:
    """Return logits over temperature in float32 or better; columns of padding are -inf."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    wide = wide / temperature
    if valid < wide.shape[1]:
        wide[:, max(valid, 0) :] = -torch.inf
    return wide


def _owned(labels: torch.Tensor, first: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tell which labels this rank's columns hold, and their local columns (0 where it does not)."""
    local = labels - first
    owned = (local >= 0) & (local < width)
    return owned, local.masked_fill(~owned, 0)


def _chunk_forward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    first: int,
    valid: int,
    temperature: float,
    group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reduce (n, V/tp) to log-probability, entropy and log-normalizer, each (n,)."""
    wide = _wide(logits, valid, temperature)
    top = wide.amax(dim=1)
    if group is not None:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    wide -= top[:, None]
    owned, local = _owned(labels, first, logits.shape[1])
    picked = wide.gather(1, local[:, None])[:, 0].masked_fill(~owned, 0.0)
    weights = wide.exp()
    # 0 * -inf of the padding columns must count as 0.
    weighted = (weights * wide.clamp(min=torch.finfo(wide.dtype).min)).sum(dim=1)
    sums = torch.stack([weights.sum(dim=1), picked, weighted])
    if group is not None:
        dist.all_reduce(sums, group=group)
    normalizer, picked, weighted = sums
    log_normalizer = normalizer.log()
    entropy = log_normalizer - weighted / normalizer
    return picked - log_normalizer, entropy, log_normalizer + top


def vocab_parallel_logprobs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    topology: Topology,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log softmax(logits / temperature)[label] and the entropy of that distribution.

    Args:
        logits: (T, V_padded / tp), this rank's columns.
        labels: (T,) token ids below ``vocab_size``.
        vocab_size: columns from here on are padding and have probability 0.

    Returns:
        log-probabilities (T,) and entropies (T,) in nats, both differentiable; float32, or float64
        for float64 logits.
    """
    width = logits.shape[1]
    first = topology.tensor.rank * width
    group = topology.tensor.group if topology.tensor.size > 1 else None
    return _LogProbs.apply(  # type: ignore[return-value]
        logits, labels, first, vocab_size - first, temperature, group
    )
