"""Problems as prompts, drawn in an order that a checkpoint can continue."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from proma_megatron.config import ConfigError
from proma_megatron.records import Problem, Prompt, TrainingSequence
from proma_megatron.rollout.tokenizer import Tokenizer


def format_prompt(question: str) -> str:
    """The text that the policy continues.

    It ends in a newline, which is one token that never merges: so the ids of a prompt followed by
    those of its completion are the ids of the whole text.
    """
    return f"Question: {question}\nAnswer:\n"


class PromptSource:
    """An endless stream of prompts: every epoch is a new seeded shuffle of all problems.

    Raises:
        ConfigError: there is no problem, or a prompt has more than ``max_prompt_tokens`` tokens.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        tokenizer: Tokenizer,
        max_prompt_tokens: int,
        seed: int,
    ) -> None:
        if not problems:
            raise ConfigError("there are no problems to make prompts of; give at least one")
        self._tokenizer = tokenizer
        self._max_prompt_tokens = max_prompt_tokens
        self._seed = seed
        # All of them now: a prompt that is too long must not surface hours into a run.
        self._prompts = [self._prompt(problem) for problem in problems]
        self._epoch, self._position = 0, 0
        self._order = self._shuffle(0)

    def take(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts; none comes twice before all have come once."""
        taken: list[Prompt] = []
        while len(taken) < n:
            if self._position == len(self._prompts):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._shuffle(self._epoch)
            end = min(self._position + n - len(taken), len(self._prompts))
            taken += [self._prompts[i] for i in self._order[self._position : end]]
            self._position = end
        return taken

    def all(self) -> list[Prompt]:
        """Every prompt, in the order of the problems."""
        return list(self._prompts)

    def state(self) -> dict[str, int]:
        """The position, for `restore`; ``seed`` and ``problems`` say which stream it is of."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "problems": len(self._prompts),
        }

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue where a source with this ``state`` would.

        Raises:
            ConfigError: the state belongs to another seed or number of problems.
        """
        own = self.state()
        for name in ("seed", "problems"):
            if state[name] != own[name]:
                raise ConfigError(
                    f"the prompts' {name} is {own[name]}, but the checkpoint was written with "
                    f"{state[name]}; resume with the same data section, or start a new run"
                )
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._shuffle(self._epoch)

    def supervised_sequence(self, problem: Problem) -> TrainingSequence:
        """Prompt, worked solution and EOS, with the loss on solution and EOS.

        Raises:
            ConfigError: the prompt has more than ``max_prompt_tokens`` tokens.
        """
        prompt = self._prompt(problem).tokens
        completion = (*self._tokenizer.encode(problem.solution), self._tokenizer.eos_id)
        length = len(prompt) + len(completion)
        return TrainingSequence(
            tokens=(*prompt, *completion),
            loss_mask=(0,) * len(prompt) + (1,) * len(completion),
            advantage=1.0,
            old_logprobs=(0.0,) * length,
        )

    def _prompt(self, problem: Problem) -> Prompt:
        text = format_prompt(problem.question)
        bos = self._tokenizer.bos_id
        tokens = (*(() if bos is None else (bos,)), *self._tokenizer.encode(text))
        if len(tokens) > self._max_prompt_tokens:
            raise ConfigError(
                f"the prompt of problem '{problem.id}' has {len(tokens)} tokens, more than "
                f"rollout.max_prompt_tokens={self._max_prompt_tokens}; raise the limit to at least "
                f"{len(tokens)}, or remove the problem"
            )
        return Prompt(problem, text, tokens)

    def _shuffle(self, epoch: int) -> list[int]:
        """The order of an epoch: a function of seed and epoch only."""
        order = list(range(len(self._prompts)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order
