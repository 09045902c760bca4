"""A trained tokenizer gives text back exactly, is deterministic, silent and written atomically."""

from __future__ import annotations

import re
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.messages import assert_names

from proma_megatron.data.arithmetic import generate_problems
from proma_megatron.data.prompts import format_plain
from proma_megatron.data.tokenizer import (
    BYTE_FALLBACK_FROM,
    SentencePieceTokenizer,
    train_tokenizer,
)
from proma_megatron.errors import ConfigError

SPACE_MARK = "\u2581"


def task_texts(count: int, seed: int = 0) -> list[str]:
    problems = generate_problems("train", count, seed)
    return [format_plain(problem.question) + problem.solution for problem in problems]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return train_tokenizer(task_texts(2000), tmp_path_factory.mktemp("small") / "t.model", 320)


@pytest.fixture(scope="module")
def with_bytes(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("bytes") / "t.model"
    return train_tokenizer(task_texts(2000), path, BYTE_FALLBACK_FROM)


def test_generated_text_of_both_splits_round_trips(small: SentencePieceTokenizer) -> None:
    unseen = generate_problems("validation", 2000, seed=5)
    texts = task_texts(2000, seed=9) + [p.question + "\n" + p.solution for p in unseen]
    assert [text for text in texts if small.decode(small.encode(text)) != text] == []


@given(st.text(string.ascii_letters + string.digits + string.punctuation + " \n"))
def test_ascii_round_trips_in_a_small_vocabulary(small: SentencePieceTokenizer, text: str) -> None:
    assert small.decode(small.encode(text)) == text


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters=SPACE_MARK)))
def test_any_text_round_trips_with_byte_fallback(
    with_bytes: SentencePieceTokenizer, text: str
) -> None:
    assert with_bytes.decode(with_bytes.encode(text)) == text


def test_ascii_is_covered_even_where_the_text_has_little_of_it(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["abc"], tmp_path / "t.model", 320)
    text = string.ascii_letters + " " + string.digits + string.punctuation + "\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unknown_characters_are_visible_in_a_small_vocabulary(
    small: SentencePieceTokenizer,
) -> None:
    assert small.decode(small.encode("5 € more")) == "5 \ufffd more"


def test_newline_and_digits_are_tokens_of_their_own(small: SentencePieceTokenizer) -> None:
    (newline,) = small.encode("\n")
    ids = small.encode("12 + 7 = 19\n#### 19\n\n")
    assert ids.count(newline) == 3
    digits = {small.encode(digit)[0] for digit in string.digits}
    assert sum(i in digits for i in ids) == len("1271919")


@given(st.text(string.printable), st.text(string.printable))
def test_a_newline_is_a_hard_boundary(with_bytes: SentencePieceTokenizer, a: str, b: str) -> None:
    assert with_bytes.encode(a + "\n" + b) == with_bytes.encode(a + "\n") + with_bytes.encode(b)


def test_special_tokens_have_fixed_ids_and_no_text(small: SentencePieceTokenizer) -> None:
    assert (small.pad_id, small.bos_id, small.eos_id) == (0, 2, 3)
    ids = small.encode("4 + 7")
    assert small.decode([2, *ids, 3, 0, 0]) == "4 + 7"
    assert not {0, 1, 2, 3} & set(small.encode("<s></s><pad>"))


def test_the_vocabulary_is_used_for_words(small: SentencePieceTokenizer) -> None:
    assert small.vocab_size == 320
    text = task_texts(1)[0]
    words = re.findall(r"\d| ?[^\s\d]+|\n", text)
    assert len(small.encode(text)) < 1.5 * len(words)


def test_an_id_outside_the_vocabulary_is_an_error(small: SentencePieceTokenizer) -> None:
    with pytest.raises(IndexError):
        small.decode([small.vocab_size])


def test_training_is_deterministic_silent_and_leaves_one_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "a" / "t.model", tmp_path / "b" / "t.model"]
    for path in paths:
        train_tokenizer(task_texts(300), path, 320)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert list(paths[0].parent.iterdir()) == [paths[0]]
    assert capfd.readouterr() == ("", "")


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.model"
    train_tokenizer(task_texts(300), path, 320)
    before = path.read_bytes()

    def interrupted(source: Path, target: Path) -> None:
        assert source.parent == target.parent  # a rename across file systems is not atomic
        assert target.read_bytes() == before
        raise OSError("interrupted")

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(OSError, match="interrupted"):
        train_tokenizer(task_texts(300, seed=1), path, 320)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_vocabulary_too_small_for_the_characters_is_refused(tmp_path: Path) -> None:
    many = "".join(chr(code) for code in range(0x4E00, 0x4E00 + 400))
    with pytest.raises(ConfigError) as error:
        train_tokenizer([many], tmp_path / "t.model", 320)
    assert_names(error, "tokenizer.vocab_size is 320")
    assert list(tmp_path.iterdir()) == []


def test_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no text"):
        train_tokenizer(["", "\n"], tmp_path / "t.model", 320)


def test_a_missing_or_foreign_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as missing:
        SentencePieceTokenizer(tmp_path / "none.model")
    assert_names(missing, "tokenizer.path", str(tmp_path / "none.model"), "does not exist")
    foreign = tmp_path / "foreign.model"
    foreign.write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="no SentencePiece model"):
        SentencePieceTokenizer(foreign)
