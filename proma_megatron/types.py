"""Frozen hand-offs between the stages of an RL step.

Shape legend used throughout the package:

    T  tokens of a packed microbatch (padding included)
    k  sequences of a packed microbatch (padding is not a sequence)
    L  tokens of one sequence
    V  vocabulary, h  hidden size, d  entries of one parameter unit
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str  # "system", "user" or "assistant"
    content: str


@dataclass(frozen=True)
class Problem:
    """One task item, before tokenization."""

    id: str
    question: str
    solution: (
        str  # worked answer, in GSM8K's form ending in "#### <answer>"; "" where none is given
    )
    answer: str  # the reference that rewards compare with
    messages: tuple[Message, ...] = ()  # the chat that data gave instead of a bare question


@dataclass(frozen=True)
class Prompt:
    """A problem with its tokenized prompt."""

    problem: Problem
    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Rollout:
    """One sampled completion of a prompt."""

    prompt: Prompt
    sample: int  # index within the prompt's group
    tokens: tuple[int, ...]  # completion, with the EOS token if it was emitted
    logprobs: tuple[float, ...]  # of each completion token under the sampling policy; same length
    text: str
    finished: bool  # ended by EOS rather than by the length limit


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with its reward."""

    rollout: Rollout
    reward: float  # what training sees: the score, with bonus and penalty
    score: float  # of the reward function alone
    timed_out: bool = False  # the function did not come back in time; the score is 0

    @property
    def correct(self) -> bool:
        """Whether the completion counts as a solution."""
        return self.score > 0.5


@dataclass(frozen=True)
class RolloutGroup:
    """All samples of one prompt: the unit over which advantages are relative."""

    prompt: Prompt
    samples: tuple[ScoredRollout, ...]


@dataclass(frozen=True)
class TrainingSequence:
    """One sequence as the trainer sees it; every tuple has length L.

    ``loss_mask[i] = 1`` counts the log-probability of token i given those before it, so position 0
    never counts. ``old_logprobs`` are the sampling policy's, by the generator or, with
    ``loss.mismatch``, by the trainer; ``reference_logprobs`` those of a KL penalty's fixed
    reference. Both are 0 where the mask is 0.
    """

    tokens: tuple[int, ...]
    loss_mask: tuple[int, ...]
    advantage: float
    old_logprobs: tuple[float, ...]
    token_weights: tuple[float, ...] | None = None  # None means 1 everywhere
    reference_logprobs: tuple[float, ...] | None = None  # None: there is no such reference

    def __post_init__(self) -> None:
        length = len(self.tokens)
        for name in ("loss_mask", "old_logprobs", "token_weights", "reference_logprobs"):
            value = getattr(self, name)
            if value is not None and len(value) != length:
                raise ValueError(
                    f"{name} has {len(value)} entries, expected {length} (one a token)"
                )

    @property
    def loss_tokens(self) -> int:
        """How many log-probabilities of this sequence count in the loss."""
        return sum(self.loss_mask[1:])


@dataclass(frozen=True)
class PackedSequences:
    """How the T tokens of a microbatch belong to its k sequences."""

    offsets: tuple[int, ...]  # (k + 1,) start of each sequence, and the end of the last
    owner: torch.Tensor  # (T,) int64 sequence of each token, k for padding
    _indicators: dict[torch.dtype, torch.Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, lengths: tuple[int, ...], total: int, device: torch.device) -> PackedSequences:
        offsets = tuple(accumulate(lengths, initial=0))
        # Filled on the device: where a backward pass is first to ask, the host must not wait for
        # copies of its lists, nor for a length that depends on values.
        owner = torch.full((total,), len(lengths), dtype=torch.int64, device=device)
        for s, (start, stop) in enumerate(pairwise(offsets)):
            owner[start:stop].fill_(s)
        return cls(offsets, owner)

    @property
    def count(self) -> int:
        return len(self.offsets) - 1

    def indicator(self, start: int, length: int, dtype: torch.dtype) -> torch.Tensor:
        """Return (k, length), 1 where token ``start + j`` belongs to the sequence."""
        if dtype not in self._indicators:  # every norm of every layer asks for it
            ids = torch.arange(self.count, device=self.owner.device)
            self._indicators[dtype] = (self.owner[None, :] == ids[:, None]).to(dtype)
        return self._indicators[dtype][:, start : start + length]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in pairwise(self.offsets))

    def padded(self, values: torch.Tensor) -> torch.Tensor:
        """Pad one row a token (T, n) to (k, L, n) for the longest sequence's L, with rows of 0."""
        return torch.cat([values, values.new_zeros(1, values.shape[1])])[self._places]

    @cached_property
    def _places(self) -> torch.Tensor:
        """(k, L) the token at each place of each sequence, T where there is none."""
        # From what is on the device: the host waits for copies of its lists.
        ids = torch.arange(self.count, device=self.owner.device)
        lengths = (self.owner == ids[:, None]).sum(dim=1)
        starts = lengths.cumsum(0) - lengths
        along = torch.arange(max(self.lengths), device=self.owner.device)
        inside = along < lengths[:, None]
        return torch.where(inside, starts[:, None] + along, len(self.owner))

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        """Spread one value a sequence (k,) to one a token (T,), 0 on padding."""
        return torch.cat([values, values.new_zeros(1)])[self.owner]

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sum one value a token (T,) by sequence (k,); padding counts nowhere."""
        offsets = torch.tensor(self.offsets, device=values.device)
        return torch.segment_reduce(values[: self.offsets[-1]], "sum", offsets=offsets)


@dataclass(frozen=True)
class Microbatch:
    """k sequences packed one after the other, as tensors on the run's device.

    Targets are shifted: entry t of ``labels``, ``loss_mask``, ``weights``, ``old_logprobs`` and
    ``reference_logprobs`` speaks of the token that position t predicts, so the last position of a
    sequence has mask 0.
    """

    index: int  # 0..M-1 within the minibatch of this replica
    tokens: torch.Tensor  # (1, T) int64
    positions: torch.Tensor  # (1, T) int64, restarting at each sequence
    labels: torch.Tensor  # (T,) int64
    loss_mask: torch.Tensor  # (T,) float64, 0 on padding and prompts
    weights: torch.Tensor  # (T,) float64, per-token loss weights
    old_logprobs: torch.Tensor  # (T,) float64
    advantages: torch.Tensor  # (k,) float64
    lengths: tuple[int, ...]  # (k,) tokens of each sequence; their sum is at most T
    denominator: float  # N of the whole minibatch over all replicas; `batching/aggregation.py`
    reference_logprobs: torch.Tensor | None = None  # (T,) float64

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.tokens.shape[1]

    @cached_property
    def sequences(self) -> PackedSequences:
        """Which token belongs to which sequence."""
        return PackedSequences.of(self.lengths, self.num_tokens, self.tokens.device)


@dataclass(frozen=True)
class StepReport:
    """What one RL step tells the world: flat metrics and a few rollouts to look at."""

    step: int
    metrics: Mapping[str, float]
    samples: tuple[Mapping[str, Any], ...] = field(default=())


def zero_variance(rewards: Sequence[float]) -> bool:
    """Tell whether all rewards of a group are equal, so that nothing can be learned from it."""
    return all(reward == rewards[0] for reward in rewards)
