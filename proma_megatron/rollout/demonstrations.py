"""Worked solutions for the supervised warm start, some of which may be mere guesses."""

from __future__ import annotations

import dataclasses
import random

from proma_megatron.records import TrainingSequence
from proma_megatron.rollout.prompts import PromptSource
from proma_megatron.rollout.tasks import ANSWER_MARK


class Demonstrations:
    """Supervised sequences from a stream of problems.

    Args:
        guesses: share of demonstrations that skip the work and state the answer of some other
            problem. A policy that imitates them has two habits, and only one of them is rewarded:
            something for RL to find out.
    """

    def __init__(self, source: PromptSource, guesses: float, seed: int) -> None:
        self._source = source
        self._guesses = guesses
        self._random = random.Random(f"demonstrations/{seed}")

    def take(self, n: int) -> list[TrainingSequence]:
        """The next ``n`` sequences, with the loss on solution and EOS."""
        problems = [prompt.problem for prompt in self._source.take(n)]
        chosen = []
        for problem in problems:
            if self._random.random() < self._guesses:
                guess = self._random.choice(problems).answer
                problem = dataclasses.replace(problem, solution=f"{ANSWER_MARK} {guess}")
            chosen.append(self._source.supervised_sequence(problem))
        return chosen
