"""Worked solutions for the supervised warm start, some of which may be mere guesses."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from proma_megatron.data.answers import ANSWER_MARK
from proma_megatron.data.prompts import PromptSource
from proma_megatron.data.tokenizer import Tokenizer
from proma_megatron.types import Prompt, TrainingSequence


def demonstration(prompt: Prompt, solution: str, tokenizer: Tokenizer) -> TrainingSequence:
    """Join prompt, worked solution and EOS, with the loss on solution and EOS."""
    completion = (*tokenizer.encode(solution), tokenizer.eos_id)
    length = len(prompt.tokens) + len(completion)
    return TrainingSequence(
        tokens=(*prompt.tokens, *completion),
        loss_mask=(0,) * len(prompt.tokens) + (1,) * len(completion),
        advantage=1.0,
        old_logprobs=(0.0,) * length,
    )


class Demonstrations:
    """Supervised sequences from a stream of prompts.

    Args:
        guesses: share of demonstrations that skip the work and state the answer of some other
            problem. A policy that imitates them has two habits, and only one of them is rewarded:
            something for RL to find out.
    """

    def __init__(
        self, source: PromptSource, tokenizer: Tokenizer, guesses: float, seed: int
    ) -> None:
        self._source, self._tokenizer = source, tokenizer
        self._guesses = guesses
        self._random = random.Random(f"demonstrations/{seed}")

    def state(self) -> dict[str, Any]:
        """Return the position, for `restore`."""
        version, words, gauss = self._random.getstate()
        return {"prompts": self._source.state(), "random": [version, list(words), gauss]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where demonstrations with this ``state`` would.

        Raises:
            ConfigError: the state belongs to other problems.
        """
        self._source.restore(state["prompts"])
        version, words, gauss = state["random"]
        self._random.setstate((version, tuple(words), gauss))

    def take(self, n: int) -> list[TrainingSequence]:
        """Return the next ``n`` sequences, with the loss on solution and EOS."""
        prompts = self._source.take(n)
        chosen = []
        for prompt in prompts:
            solution = prompt.problem.solution
            if self._random.random() < self._guesses:
                solution = f"{ANSWER_MARK} {self._random.choice(prompts).problem.answer}"
            chosen.append(demonstration(prompt, solution, self._tokenizer))
        return chosen
