"""What an engine for rollouts takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Interrupt = Callable[[], object]  # true: give up


class Interrupted(Exception):  # noqa: N818 - no error
    """Sampling was given up, on all ranks of this replica."""


@dataclass(frozen=True)
class SamplingOptions:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 48
    batch_size: int = 128
    greedy: bool = False

    @property
    def sorts(self) -> bool:
        """Whether a draw needs all logits of a row in order."""
        return not self.greedy and self.top_p < 1


@dataclass(frozen=True)
class Completion:
    tokens: tuple[int, ...]  # with the stop token if one was emitted
    logprobs: tuple[float, ...]
    finished: bool  # by a stop token
