"""How token losses become one number: weights of tokens, and a global denominator N.

A loss is ``(1/N) sum_s sum_t w_st loss_st`` over all sequences of a minibatch, whichever replica
and microbatch they are in, so neither changes it. With |y| the loss tokens of a sequence:

    token_mean     w as given, N = all loss tokens. Long sequences weigh more. DAPO
                   (arXiv:2503.14476, section 3.3).
    sequence_mean  w / |y|, N = sequences. Every sequence weighs the same, so a token in a long one
                   less. GRPO (arXiv:2402.03300, equation 3), GSPO (arXiv:2507.18071).
    sequence_sum   w as given, N = sequences * constant. A token weighs the same in any sequence
                   and any minibatch. Dr. GRPO (arXiv:2503.20783), whose constant is
                   the generation budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from proma_megatron.batching.packing import loss_tokens
from proma_megatron.types import TrainingSequence


def aggregate(
    sequences: Sequence[TrainingSequence], mode: str, constant: float
) -> tuple[list[TrainingSequence], float]:
    """Return the sequences with the weights that ``mode`` asks for, and N, which is never 0.

    Sequences without loss tokens have no loss, and don't count as sequences.

    Args:
        sequences: of the whole minibatch, over all replicas.
        mode: "token_mean", "sequence_mean" or "sequence_sum".
        constant: of ``sequence_sum``, above 0.

    Raises:
        ValueError: ``mode`` is none of these.
    """
    counted = max(1, sum(sequence.loss_tokens > 0 for sequence in sequences))
    if mode == "token_mean":
        return list(sequences), float(max(1, loss_tokens(sequences)))
    if mode == "sequence_mean":
        return [_divided_by_length(sequence) for sequence in sequences], float(counted)
    if mode == "sequence_sum":
        return list(sequences), counted * constant
    raise ValueError(f"unknown aggregation {mode!r}")


def _divided_by_length(sequence: TrainingSequence) -> TrainingSequence:
    length = max(1, sequence.loss_tokens)
    weights = sequence.token_weights or (1.0,) * len(sequence.tokens)
    return replace(sequence, token_weights=tuple(weight / length for weight in weights))
