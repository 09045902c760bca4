"""Text to token ids and back: a small interface, and SentencePiece behind it.

Hugging Face's tokenizers are behind it in `hf_tokenizer`.
"""

from __future__ import annotations

import io
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from proma_megatron.errors import ConfigError
from proma_megatron.files import atomic_write
from proma_megatron.types import Message

# Byte fallback costs 256 pieces. A smaller vocabulary has none left for whole words, so it covers
# printable ASCII and the training text's characters instead.
BYTE_FALLBACK_FROM = 512
SPACE = "\u2581"  # how SentencePiece writes one


class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int:
        """The token that ends a worked answer."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that ends a completion; ``eos_id`` is the first."""
        ...

    @property
    def has_chat_template(self) -> bool: ...

    def encode(self, text: str) -> list[int]:
        """Return ids of ``text``, without BOS and EOS."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; special tokens give nothing."""
        ...

    def chat(self, messages: Sequence[Message], thinking: bool) -> str:
        """Return the chat template's text of these messages, up to where the answer begins.

        Raises:
            ConfigError: there is no template, or it refuses these messages.
        """
        ...


class SentencePieceTokenizer:
    """A SentencePiece ``.model`` file.

    A tokenizer of `train_tokenizer` gives back any text from its ids exactly, up to two exceptions:
    "\\u2581", by which SentencePiece writes a space, and, below `BYTE_FALLBACK_FROM` pieces,
    characters that are neither printable ASCII nor in the training text, which become "\\ufffd".

    Raises:
        ConfigError: the file is missing, is no SentencePiece model, or has no EOS token.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ConfigError(
                f"tokenizer.path is {path}, which does not exist; give a SentencePiece .model file"
            )
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError:
            raise ConfigError(
                f"tokenizer.path is {path}, which is no SentencePiece model; give a .model file"
            ) from None
        if self._processor.eos_id() < 0:
            raise ConfigError(
                f"tokenizer.path is {path}, a model without an EOS token; use one that has it, "
                "because completions end with EOS"
            )

    @property
    def vocab_size(self) -> int:
        return self._processor.GetPieceSize()

    @property
    def pad_id(self) -> int:
        """The padding token; EOS where the model has none, since padding is masked anyway."""
        pad = self._processor.pad_id()
        return pad if pad >= 0 else self.eos_id

    @property
    def bos_id(self) -> int | None:
        bos = self._processor.bos_id()
        return bos if bos >= 0 else None

    @property
    def eos_id(self) -> int:
        return self._processor.eos_id()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.eos_id,)

    @property
    def has_chat_template(self) -> bool:
        return False

    def encode(self, text: str) -> list[int]:
        """Return ids of ``text``, without BOS and EOS."""
        return self._processor.EncodeAsIds(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; special tokens give nothing.

        Raises:
            IndexError: an id is not below ``vocab_size``.
        """
        return self._processor.DecodeIds(list(ids))

    def chat(self, messages: Sequence[Message], thinking: bool) -> str:
        raise ConfigError(
            "prompt.template is 'chat', but a SentencePiece model has no chat template; use 'plain'"
        )

    def transformers_settings(self) -> dict[str, Any]:
        """Return ``tokenizer_config.json`` for a directory with this model as tokenizer.model."""
        processor = self._processor
        special = {
            "bos_token": processor.bos_id(),
            "eos_token": processor.eos_id(),
            "unk_token": processor.unk_id(),
            "pad_token": processor.pad_id(),
        }
        return {
            "tokenizer_class": "LlamaTokenizer",  # transformers' reader of SentencePiece models
            "add_bos_token": self.bos_id is not None,
            "add_eos_token": False,
            "add_prefix_space": processor.EncodeAsPieces("a")[0].startswith(SPACE),
            "legacy": False,
        } | {name: processor.IdToPiece(i) for name, i in special.items() if i >= 0}


def train_tokenizer(texts: Iterable[str], path: Path, vocab_size: int) -> SentencePieceTokenizer:
    """Train a BPE tokenizer of at most ``vocab_size`` pieces, write it to ``path`` and load it.

    Ids 0..3 are PAD, UNK, BOS and EOS; a newline is one token that never merges, and every digit is
    a token. The same texts give the same file, byte for byte, and the file appears complete or not
    at all, so several processes may train to one path.

    Raises:
        ConfigError: ``vocab_size`` is too small for the texts' characters, or there is no text.
    """
    lines = [line for text in texts for line in text.split("\n") if line]
    if not lines:
        raise ConfigError("there is no text to train the tokenizer on; give at least one problem")
    byte_fallback = vocab_size >= BYTE_FALLBACK_FROM
    if not byte_fallback:
        # Not by `required_chars`, which SentencePiece 0.2.3 ignores for a text without spaces. A
        # line of one character is always covered, and merges with nothing.
        lines += string.digits + string.ascii_letters + string.punctuation + " "
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=byte_fallback,
            character_coverage=0.9995 if byte_fallback else 1.0,
            split_digits=True,
            # Without these three, spaces and newlines would not survive.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            # A completion starts at a line's beginning, where there is no space.
            add_dummy_prefix=False,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            unk_surface="\ufffd",
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"tokenizer.vocab_size is {vocab_size}, too small for this text ({reason}); raise it"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        part.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)
