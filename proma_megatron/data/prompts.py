"""Problems as prompts, drawn in an order that a checkpoint can continue."""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping, Sequence

from proma_megatron.config.data import PromptConfig
from proma_megatron.data.tokenizer import Tokenizer
from proma_megatron.errors import ConfigError
from proma_megatron.types import Message, Problem, Prompt


def format_plain(question: str) -> str:
    """Return the text that the policy continues where there is no chat template.

    It ends in a newline. In a tokenizer of ours that is one token that never merges: so the ids of
    a prompt followed by those of its completion are the ids of the whole text.
    """
    return f"Question: {question}\nAnswer:\n"


class PromptFormat:
    """From problems to prompts: the tokenizer's chat template, or plain text.

    Raises:
        ConfigError: a system message is asked for, and prompts are plain.
    """

    def __init__(self, config: PromptConfig, tokenizer: Tokenizer) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._chat = config.template == "chat" or (
            config.template == "auto" and tokenizer.has_chat_template
        )
        if not self._chat and config.system is not None:
            raise ConfigError(
                f"prompt.system is {config.system!r}, but plain prompts have no system message; "
                "leave it out, or use a tokenizer with a chat template"
            )

    def prompt(self, problem: Problem) -> Prompt:
        """Return the problem with the text and the tokens that the policy continues.

        Raises:
            ConfigError: there is no chat template, it refuses the problem's messages, or plain
                prompts can't hold them.
        """
        text = self._text(problem)
        ids = self._tokenizer.encode(text)
        bos = self._tokenizer.bos_id
        if bos is not None and not (self._chat and ids[:1] == [bos]):
            ids = [bos, *ids]
        return Prompt(problem, text, tuple(ids))

    def _text(self, problem: Problem) -> str:
        if self._chat:
            return self._tokenizer.chat(self._messages(problem), self._config.thinking)
        if len(problem.messages) > 1:
            raise ConfigError(
                f"problem '{problem.id}' is a chat of {len(problem.messages)} messages, which "
                "plain prompts can't hold; use a tokenizer with a chat template"
            )
        plain = problem.question if problem.messages else self._instructed(problem.question)
        return format_plain(plain)

    def _messages(self, problem: Problem) -> list[Message]:
        # A chat says itself what is asked for, and its system message goes before ours.
        asked = Message("user", self._instructed(problem.question))
        turns = list(problem.messages) or [asked]
        if self._config.system is not None and turns[0].role != "system":
            turns.insert(0, Message("system", self._config.system))
        return turns

    def _instructed(self, question: str) -> str:
        return f"{question} {self._config.instruction}" if self._config.instruction else question


def drop_long(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    """Return the prompts of at most ``limit`` tokens, in their order."""
    return [prompt for prompt in prompts if len(prompt.tokens) <= limit]


class PromptSource:
    """An endless stream of prompts: every epoch is a new seeded shuffle of all of them.

    Raises:
        ConfigError: there are no prompts.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise ConfigError("there are no problems to make prompts of; give at least one")
        self._prompts, self._seed = list(prompts), seed
        texts = "\n".join(f"{p.problem.id} {p.text} {p.problem.answer}" for p in self._prompts)
        self._checksum = zlib.crc32(texts.encode(errors="surrogatepass"))
        self._epoch, self._position = 0, 0
        self._order = self._shuffle(0)

    def take(self, n: int) -> list[Prompt]:
        """Return the next ``n`` prompts; none comes twice before all have come once."""
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
        """Return every prompt, in the order of the problems."""
        return list(self._prompts)

    def state(self) -> dict[str, int]:
        """Return the position, for `restore`; the rest says which stream it is of."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "problems": len(self._prompts),
            "checksum": self._checksum,
        }

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue where a source with this ``state`` would.

        Raises:
            ConfigError: the state belongs to another seed, or to other problems.
        """
        own = self.state()
        for name in ("seed", "problems", "checksum"):
            if state[name] != own[name]:
                raise ConfigError(
                    f"the prompts' {name} is {own[name]}, but the checkpoint was written with "
                    f"{state[name]}; resume with the same data section, or start a new run"
                )
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._shuffle(self._epoch)

    def _shuffle(self, epoch: int) -> list[int]:
        """Return the order of an epoch: a function of seed and epoch only."""
        order = list(range(len(self._prompts)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order
