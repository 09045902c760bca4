"""Draw tokens from logits."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist

from proma_megatron.distributed.topology import Axis


def noise(seed: int, step: int, prompt: int, sample: int, count: int) -> torch.Tensor:
    """Return (count,) uniform numbers that belong to one rollout.

    A function of these arguments alone (``prompt`` is a place among the step's prompts): what is
    sampled does not depend on the batch a rollout decodes in, nor on the layout.
    """
    digest = hashlib.sha256(f"{seed}:{step}:{prompt}:{sample}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def sample(
    logits: torch.Tensor,
    uniform: torch.Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row, by inversion of the cumulative distribution.

    Args:
        logits: (b, V) without vocabulary padding.
        uniform: (b,) in [0, 1); None takes the most likely token.
        top_k: sample among this many most likely tokens; 0 is off.
        top_p: sample within the smallest set of tokens that holds this probability.

    Returns:
        tokens (b,) and their log-probabilities (b,) under softmax(logits / temperature). The
        truncations decide what is drawn, not what its probability is taken to be, as in the
        training loss.
    """
    logprobs = torch.log_softmax(_scaled(logits, temperature), dim=1)
    if uniform is None:
        tokens = logprobs.argmax(dim=1)
    else:
        probabilities = _truncate(logprobs.double().exp(), top_k, top_p)
        cumulative = probabilities.cumsum(dim=1)
        target = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
        # Rounding may put the target on the total itself, past the last token with probability.
        tokens = torch.minimum(tokens, _last_positive(probabilities))
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def sample_shard(
    logits: torch.Tensor,
    first: int,
    uniform: torch.Tensor | None,
    temperature: float,
    top_k: int,
    tensor: Axis,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw as `sample` from logits in shards of the vocabulary, without a top-p; a collective.

    Three numbers a row cross ranks: the largest logit, and the mass of all and of the truncated
    shard relative to it. From these, the same on all ranks, each says whose columns hold the draw,
    and that one finds it; a top-k costs one more collective, of k logits a row.

    Args:
        logits: (b, n) of this rank, without vocabulary padding; n may be 0.
        first: token of the first column.

    Returns:
        tokens (b,) and their log-probabilities (b,) where this rank holds the draw, 0 elsewhere:
        added up over ranks they are the result.
    """
    if not logits.shape[1]:  # nothing but padding
        logits = logits.new_full((len(logits), 1), -torch.inf)
    wide = _scaled(logits, temperature)
    top = wide.amax(dim=1).double().clamp(min=torch.finfo(torch.float64).min)
    weights = wide.to(torch.float64, copy=True).sub_(top[:, None]).exp_()
    mass = weights.sum(dim=1)
    if top_k and uniform is not None:
        weights.masked_fill_(wide < _kth_largest(wide, top_k, tensor)[:, None], 0.0)
    tops, masses, kept = _gather(torch.stack([top, mass, weights.sum(dim=1)]), tensor).unbind(1)
    highest = tops.amax(dim=0)
    scales = (tops - highest).exp()  # (ranks, b)
    normalizer = highest + (scales * masses).sum(dim=0).log()
    if uniform is None:
        owner, token = tops.argmax(dim=0), wide.argmax(dim=1)
    else:
        cumulative = (scales * kept).cumsum(dim=0)
        target = uniform.to(cumulative) * cumulative[-1]
        owner = (cumulative <= target).sum(dim=0)
        owner = torch.minimum(owner, _last_positive(kept.t()))
        if tensor.rank:
            target = target - cumulative[tensor.rank - 1]
        inside = torch.searchsorted(
            weights.cumsum(dim=1), (target / scales[tensor.rank])[:, None], right=True
        )
        token = torch.minimum(inside[:, 0], _last_positive(weights))
    mine = owner == tensor.rank
    logprobs = wide.gather(1, token[:, None])[:, 0].double() - normalizer
    return torch.where(mine, token + first, 0), torch.where(mine, logprobs, 0.0)


def _scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return logits over temperature in float32 or better."""
    return (logits if logits.dtype == torch.float64 else logits.float()) / temperature


def _kth_largest(values: torch.Tensor, k: int, tensor: Axis) -> torch.Tensor:
    """Return (b,) k-th largest values of all ranks' rows (b, n); the smallest of short rows."""
    local = values.topk(min(k, values.shape[1]), dim=1).values
    padded = torch.nn.functional.pad(local, (0, k - local.shape[1]), value=-torch.inf)
    return _gather(padded, tensor).transpose(0, 1).flatten(1).topk(k, dim=1).values[:, -1]


def _gather(values: torch.Tensor, tensor: Axis) -> torch.Tensor:
    """Gather every rank's values to (ranks, *shape)."""
    found = values.new_empty((tensor.size * len(values), *values.shape[1:]))
    dist.all_gather_into_tensor(found, values.contiguous(), group=tensor.group)
    return found.view(tensor.size, *values.shape)


def _last_positive(values: torch.Tensor) -> torch.Tensor:
    """Return (b,) places of the last entry above 0 of each row (b, n); 0 where there is none."""
    return (values > 0).int().cumsum(dim=1).argmax(dim=1)


def _truncate(probabilities: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Set probabilities outside of top-k and top-p to 0, without renormalizing."""
    vocabulary = probabilities.shape[1]
    if 0 < top_k < vocabulary:
        smallest = probabilities.topk(top_k, dim=1).values[:, -1:]
        probabilities = probabilities.masked_fill(probabilities < smallest, 0.0)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=1, descending=True)
        before = ordered.cumsum(dim=1) - ordered
        outside = before >= top_p * ordered.sum(dim=1, keepdim=True)
        probabilities = probabilities.masked_fill(outside.gather(1, order.argsort(dim=1)), 0.0)
    return probabilities
