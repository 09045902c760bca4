"""Sizes that the projection and the planner share; without torch."""

from __future__ import annotations


def kept_slices(count: int, *, accumulates: bool) -> int:
    """What G of ``count`` sequences takes, in weights.

    Args:
        accumulates: with room for an accumulated gradient, beside which several are contracted.
    """
    return count + (accumulates and count > 1)


DIRECT_TOKENS = 256


ITERATIONS = 8


OVERSAMPLING = 8


def sketch_width(rank: int) -> int:
    """l: columns that the iteration carries."""
    return rank + max(rank, OVERSAMPLING)


def is_direct(tokens: int, rank: int) -> bool:
    """Whether the (T, T) Gram matrix is used."""
    return tokens <= max(DIRECT_TOKENS, sketch_width(rank))
