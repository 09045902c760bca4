"""Cut training sequences into packed microbatches under a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import batched

import torch

from proma_megatron.types import Microbatch, TrainingSequence


def plan_microbatches(
    lengths: Sequence[int], budget: int, replicas: int = 1, multiple: int = 1
) -> list[list[list[int]]]:
    """Return indices of sequences by replica and microbatch, balanced in tokens.

    The number of microbatches is the smallest that the budget allows, rounded up so that every
    replica gets the same number, a multiple of ``multiple`` (interleaved pipelines take a multiple
    of their stages); longest sequences are placed first, each into the lightest
    microbatch that has room. Sequences keep their order within a microbatch.

    Returns:
        For each replica its microbatches. Global microbatch i is
        ``result[i % replicas][i // replicas]``.

    Raises:
        ValueError: a sequence longer than the budget.
    """
    for index, length in enumerate(lengths):
        if length > budget:
            raise ValueError(
                f"sequence {index} has {length} tokens, but a microbatch may hold {budget}; "
                "raise batching.tokens_per_microbatch"
            )
    count = max(1, -(-sum(lengths) // budget))
    while True:
        count = -(-count // (replicas * multiple)) * replicas * multiple
        bins = _balance(lengths, budget, count)
        if bins is not None:
            return [bins[replica::replicas] for replica in range(replicas)]
        count += 1


def consecutive_microbatches(
    count: int, size: int, replicas: int = 1, multiple: int = 1
) -> list[list[list[int]]]:
    """Cut ``count`` sequences into runs of ``size``; return indices as `plan_microbatches` does.

    Empty microbatches at the end fill up what replicas and ``multiple`` ask for.
    """
    bins = [list(found) for found in batched(range(count), size)] or [[]]
    bins += [[]] * (-len(bins) % (replicas * multiple))
    return [bins[replica::replicas] for replica in range(replicas)]


def _balance(lengths: Sequence[int], budget: int, count: int) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        lightest = min(range(count), key=lambda b: (loads[b], b))
        if loads[lightest] + lengths[index] > budget:
            return None
        bins[lightest].append(index)
        loads[lightest] += lengths[index]
    return [sorted(found) for found in bins]


def loss_tokens(sequences: Sequence[TrainingSequence]) -> int:
    """Count the log-probabilities that enter the loss, over all of these sequences."""
    return sum(sequence.loss_tokens for sequence in sequences)


def pack(
    sequences: Sequence[TrainingSequence],
    index: int,
    denominator: float,
    device: torch.device,
    multiple: int = 1,
) -> Microbatch:
    """Lay sequences one after the other, padded to a multiple of ``multiple`` tokens.

    ``multiple`` is the tensor-parallel size under sequence parallelism. An empty microbatch is
    padding alone; it keeps replicas in step.

    Raises:
        ValueError: only some of the sequences have reference log-probabilities.
    """
    referenced = sum(sequence.reference_logprobs is not None for sequence in sequences)
    if referenced not in (0, len(sequences)):
        raise ValueError(
            f"{referenced} of {len(sequences)} sequences have reference_logprobs; give them to "
            "all, or to none"
        )
    lengths = tuple(len(sequence.tokens) for sequence in sequences)
    total = max(multiple, -(-sum(lengths) // multiple) * multiple)
    tokens, positions, labels = ([0] * total for _ in range(3))
    mask, weights, old, reference = ([0.0] * total for _ in range(4))
    start = 0
    for sequence in sequences:
        stop = start + len(sequence.tokens)
        tokens[start:stop] = sequence.tokens
        positions[start:stop] = range(stop - start)
        # Entry t speaks of token t + 1; nothing is predicted from a sequence's last token.
        labels[start : stop - 1] = sequence.tokens[1:]
        mask[start : stop - 1] = [float(value) for value in sequence.loss_mask[1:]]
        old[start : stop - 1] = sequence.old_logprobs[1:]
        if sequence.reference_logprobs is not None:
            reference[start : stop - 1] = sequence.reference_logprobs[1:]
        token_weights = sequence.token_weights
        weights[start : stop - 1] = (
            token_weights[1:] if token_weights is not None else [1.0] * (stop - start - 1)
        )
        start = stop
    positions[start:] = range(total - start)
    integer = {"dtype": torch.int64, "device": device}
    real = {"dtype": torch.float64, "device": device}
    return Microbatch(
        index=index,
        tokens=torch.tensor([tokens], **integer),
        positions=torch.tensor([positions], **integer),
        labels=torch.tensor(labels, **integer),
        loss_mask=torch.tensor(mask, **real),
        weights=torch.tensor(weights, **real),
        old_logprobs=torch.tensor(old, **real),
        advantages=torch.tensor([sequence.advantage for sequence in sequences], **real),
        lengths=lengths,
        denominator=denominator,
        reference_logprobs=torch.tensor(reference, **real) if referenced else None,
    )
