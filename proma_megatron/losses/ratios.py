"""Importance ratios of tokens, and their clipping."""

from __future__ import annotations

import torch


def token_ratios(logprobs: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Return ``pi / pi_old`` of each token (T,), differentiable in ``logprobs``."""
    return torch.exp(logprobs - old)


def clip(ratios: torch.Tensor, low: float | None, high: float | None) -> torch.Tensor:
    """Keep ratios (T,) within [1 - low, 1 + high]; None leaves that side open."""
    if low is not None:
        ratios = ratios.clamp(min=1 - low)
    if high is not None:
        ratios = ratios.clamp(max=1 + high)
    return ratios
