"""Updates that are not finite: noticed by all ranks together, and the microbatch that is to blame.

An update is skipped if the loss of a microbatch, a unit's projection or the gradient is not finite.
To notice costs a norm of each of Megatron's gradient buffers, which are contiguous, and one
all-reduce of an integer; losses and projections are looked at on the way. Who is to blame is only
asked afterwards, and may cost another pass over every microbatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from proma_megatron.batching.batch_file import write_batch
from proma_megatron.batching.packing import loss_tokens
from proma_megatron.files import atomic_write
from proma_megatron.learner.minibatch import MinibatchPass, What
from proma_megatron.learner.schedule import Sums
from proma_megatron.types import TrainingSequence

Chain = tuple[tuple[TrainingSequence, ...], ...]  # sequences by microbatch


@dataclass(frozen=True)
class NonFiniteEvent:
    """What was not finite in an update that was skipped, and the sequences that show it."""

    what: What
    replica: int
    minibatch: int  # of the step
    microbatch: int  # of the replica's minibatch; of a chain the last one
    # That microbatch; or the chain up to it, where none is to blame by itself. A token whose ratio
    # or penalty is not finite has NaN for a weight.
    microbatches: Chain
    denominator: float  # N of the whole minibatch


# --------------------------------------------------------------------------- noticing


# --------------------------------------------------------------------------- blaming


@dataclass(frozen=True)
class Blame:
    """Part of a replica's chain: microbatches ``first`` to ``last``."""

    what: What
    first: int
    last: int
    positions: tuple[int, ...] = ()  # see `schedule.BadLoss`


def blame(done: MinibatchPass, sums: Sums) -> list[Blame | None]:
    """Find what is to blame, by replica, for an update that is not finite; the same on all ranks.

    In this order, and only the first that finds anything: microbatches whose loss is not finite;
    microbatches that are not finite by themselves; chains up to where projection failed; whole
    chains; and if only the sum over replicas overflows, all of them. Overwrites ``main_grad``.

    Args:
        sums: of this replica, from the pass.
    """
    topology = done.policy.topology
    last = len(done.microbatches) - 1
    # Passes of the search replace the tally.
    failed = topology.least(min(done.unprojected(), default=last + 1), topology.model)
    looks: tuple[Callable[[], Blame | None], ...] = (
        lambda: _by_loss(sums),
        lambda: _by_itself(done, min(failed, last)),
        lambda: Blame("projection", 0, failed) if failed <= last else None,
        lambda: Blame("gradient", 0, last) if done.fails(0, last + 1) else None,
        lambda: Blame("gradient", 0, last),
    )
    found: list[Blame | None] = []
    for look in looks:
        found = topology.gather_over_data(topology.from_model_rank_0(look()))
        if any(found):
            break
    return found


def _by_loss(sums: Sums) -> Blame | None:
    if not sums.bad_losses:
        return None
    bad = min(sums.bad_losses, key=lambda found: found.microbatch)
    return Blame("loss", bad.microbatch, bad.microbatch, bad.positions)


def _by_itself(done: MinibatchPass, last: int) -> Blame | None:
    """Find the first of microbatches 0 to ``last`` that is not finite alone."""
    for index in range(last + 1):
        if not done.microbatches[index].lengths:
            continue  # it only keeps replicas in step
        what = done.fails(index, index + 1)
        if what is not None:
            return Blame(what, index, index)
    return None


def offences(
    found: Sequence[Blame | None], chains: Sequence[Chain], minibatch: int, denominator: float
) -> list[NonFiniteEvent]:
    """Return the offences of one skipped update.

    Args:
        found: by replica.
        chains: each replica's sequences by microbatch.
    """
    return [
        NonFiniteEvent(
            what=blamed.what,
            replica=replica,
            minibatch=minibatch,
            microbatch=blamed.last,
            microbatches=_marked(chain[blamed.first : blamed.last + 1], blamed.positions),
            denominator=denominator,
        )
        for replica, (blamed, chain) in enumerate(zip(found, chains, strict=True))
        if blamed is not None
    ]


def _marked(chain: Chain, positions: Sequence[int]) -> Chain:
    """Return the chain with NaN for the weights of these positions of its only microbatch."""
    if not positions:
        return chain
    ((*sequences,),) = chain
    start, marked = 0, []
    for sequence in sequences:
        stop = start + len(sequence.tokens)
        # Position t speaks of token t + 1. What is not finite in the sequence itself says enough.
        bad = {at - start + 1 for at in positions if start <= at < stop}
        weights = list(sequence.token_weights or (1.0,) * len(sequence.tokens))
        if bad and math.isfinite(sequence.advantage):
            weights = [math.nan if at in bad else w for at, w in enumerate(weights)]
            sequence = replace(sequence, token_weights=tuple(weights))
        marked.append(sequence)
        start = stop
    return (tuple(marked),)


# --------------------------------------------------------------------------- dumping


def dump(offence: NonFiniteEvent, path: Path) -> None:
    """Write the sequences as a batch file, complete or not at all; for one rank.

    `proma grads` divides by the loss tokens of its file, the run by those of its whole minibatch:
    token weights make up for it, so that the gradient has the run's size.
    """
    chain = [microbatch for microbatch in offence.microbatches if microbatch]
    tokens = loss_tokens([sequence for microbatch in chain for sequence in microbatch])
    scale = max(1, tokens) / offence.denominator
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        write_batch(part, [[_scaled(s, scale) for s in m] for m in chain], logprobs=True)


def _scaled(sequence: TrainingSequence, scale: float) -> TrainingSequence:
    weights = sequence.token_weights or (1.0,) * len(sequence.tokens)
    return replace(sequence, token_weights=tuple(weight * scale for weight in weights))
