"""Hugging Face's tokenizers and chat templates, with the model's own word on what ends a text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from proma_megatron.errors import ConfigError
from proma_megatron.types import Message

# What of a directory belongs to the tokenizer, and to how its model generates.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
ONE_OF = ("tokenizer.json", "tokenizer.model", "vocab.json")
GENERATION_CONFIG = "generation_config.json"


class HuggingFaceTokenizer:
    """The tokenizer of a Hugging Face directory; nothing is downloaded, no remote code runs.

    EOS and padding are those of ``generation_config.json`` where there is one, else of
    ``config.json``, and the tokenizer's own: a chat model's file lists the token that ends a turn
    and the one that ends a text, and either ends a completion.

    Args:
        path: directory with the tokenizer's files.
        model: directory of the model, where it is another one.

    Raises:
        ConfigError: there is no tokenizer, it can't be loaded, or nothing ends a text.
    """

    def __init__(self, path: Path, model: Path | None = None) -> None:
        if not any((path / name).is_file() for name in ONE_OF):
            raise ConfigError(
                f"{path} holds no tokenizer ({', '.join(ONE_OF)}); give "
                "tokenizer.path, or a model directory with its tokenizer"
            )
        from transformers import AutoTokenizer  # seconds to import

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # each format fails in a way of its own
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"the tokenizer in {path} can't be loaded ({reason}); download it again"
            ) from None
        settings = _generation_settings(model or path)
        own = self._tokenizer.eos_token_id
        listed = _ids(settings.get("eos_token_id"))
        self._stop_ids = tuple(dict.fromkeys(([own] if own is not None else []) + listed))
        if not self._stop_ids:
            raise ConfigError(
                f"nothing in {model or path} says which token ends a text; give eos_token_id in "
                f"{GENERATION_CONFIG}"
            )
        # Not its number of tokens: there may be gaps between the ids.
        ids = self._tokenizer.get_vocab().values()
        self._vocab_size = 1 + max(*ids, *self._stop_ids)
        pads = [*_ids(settings.get("pad_token_id")), *_ids(self._tokenizer.pad_token_id)]
        self._pad_id = pads[0] if pads else self._stop_ids[0]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return self._vocab_size

    @property
    def pad_id(self) -> int:
        return self._pad_id

    @property
    def bos_id(self) -> int | None:
        return self._tokenizer.bos_token_id

    @property
    def eos_id(self) -> int:
        return self._stop_ids[0]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self._stop_ids

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """Return ids of ``text``, special tokens in it included, without BOS and EOS."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; special tokens and ids that it hasn't give nothing."""
        return self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def chat(self, messages: Sequence[Message], thinking: bool) -> str:
        if not self.has_chat_template:
            raise ConfigError(
                "prompt.template is 'chat', but the tokenizer has no chat template; use 'plain', "
                "or give a tokenizer.path that has one"
            )
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
            )
        except Exception as error:  # a template may refuse in any way
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"the tokenizer's chat template fails on roles "
                f"{[message.role for message in messages]} ({reason}); change the messages, or use "
                "prompt.template=plain"
            ) from None


def _generation_settings(path: Path) -> dict[str, Any]:
    """Read what the model's files say about EOS and padding; the first with an EOS counts."""
    for name in (GENERATION_CONFIG, "config.json"):
        file = path / name
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise ConfigError(
                f"{file} can't be read as JSON ({error}); download it again"
            ) from None
        if isinstance(found, dict) and found.get("eos_token_id") is not None:
            return found
    return {}


def _ids(value: Any) -> list[int]:
    found = value if isinstance(value, list) else [value]
    return [i for i in found if isinstance(i, int)]
