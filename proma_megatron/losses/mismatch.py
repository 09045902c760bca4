"""Weights for tokens that one program sampled and another one scores.

A generator with other kernels or another precision than the trainer samples from a slightly
different policy, although the weights are the same. Importance weights correct for it; cutting
them at ``cap`` bounds their variance at the price of a bias.

Sources: F. Yao et al., "Your efficient RL framework secretly brings you off-policy RL training",
2025; E. L. Ionides, "Truncated importance sampling", 2008.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def truncated_weights(
    trainer: Sequence[float], generator: Sequence[float], mode: str, cap: float
) -> tuple[float, ...]:
    """Return a weight for each loss token of one sequence.

    Args:
        trainer: log-probabilities of the n loss tokens, by the trainer with the sampling weights.
        generator: of the same tokens, by the program that sampled them.
        mode: "token": ``min(exp(trainer - generator), cap)``, each its own. "sequence": all have
            that of the sum of differences, the ratio of the whole completion.
        cap: of a weight, above 0.

    Returns:
        (n,) in (0, cap], or 0 where that underflows.
    """
    differences = [mine - theirs for mine, theirs in zip(trainer, generator, strict=True)]
    if mode == "token":
        return tuple(_truncated(difference, cap) for difference in differences)
    if mode == "sequence":
        return (_truncated(math.fsum(differences), cap),) * len(differences)
    raise ValueError(f"unknown mismatch mode {mode!r}")


def _truncated(difference: float, cap: float) -> float:
    # Compared as logarithms first: exp of a long sequence's sum may overflow.
    return cap if difference >= math.log(cap) else min(math.exp(difference), cap)
