"""Draw tokens from logits."""

from __future__ import annotations

import hashlib

import torch


def noise(seed: int, step: int, prompt: int, sample: int, count: int) -> torch.Tensor:
    """(count,) uniform numbers that belong to one rollout.

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
    """One token a row, by inversion of the cumulative distribution.

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
    wide = logits if logits.dtype == torch.float64 else logits.float()
    logprobs = torch.log_softmax(wide / temperature, dim=1)
    if uniform is None:
        tokens = logprobs.argmax(dim=1)
    else:
        probabilities = _truncate(logprobs.double().exp(), top_k, top_p)
        cumulative = probabilities.cumsum(dim=1)
        target = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
        # Rounding may put the target on the total itself, past the last token with probability.
        last = (probabilities > 0).int().cumsum(dim=1).argmax(dim=1)
        tokens = torch.minimum(tokens, last)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def _truncate(probabilities: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Probabilities with everything outside of top-k and top-p set to 0, not renormalized."""
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
