"""Sizes that the projection and the planner share; without torch."""

from __future__ import annotations

BLOCK_BYTES = 32 * 2**20  # of a block in passing: a last-level cache holds it

# Intra-PROMA's dominant subspaces, see `rules.intra_proma`.
DIRECT_TOKENS = 256  # up to so many, the Gram matrix of tokens is decomposed
ITERATIONS = 8  # of the subspace iteration beyond
OVERSAMPLING = 8  # least number of columns that it carries beside the rank


def kept_slices(count: int, *, accumulates: bool) -> int:
    """Return what G of ``count`` sequences takes, in weights.

    Args:
        accumulates: with room for an accumulated gradient, beside which several are contracted.
    """
    return count + (accumulates and count > 1)


def sketch_width(rank: int) -> int:
    """Return l, the columns that the iteration carries."""
    return rank + max(rank, OVERSAMPLING)


def is_direct(tokens: int, rank: int) -> bool:
    """Return whether the (T, T) Gram matrix is used."""
    return tokens <= max(DIRECT_TOKENS, sketch_width(rank))
