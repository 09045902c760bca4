"""Hugging Face tokenizers: texts survive, chats are rendered, files decide what ends a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.messages import assert_names
from support.qwen import END_OF_TEXT, END_OF_TURN, write_tokenizer
from transformers import AutoTokenizer

from proma_megatron.config.data import PromptConfig
from proma_megatron.data.hf_tokenizer import HuggingFaceTokenizer
from proma_megatron.data.prompts import PromptFormat
from proma_megatron.errors import ConfigError
from proma_megatron.types import Message, Problem

CHAT = [Message("system", "Be brief."), Message("user", "2 + 2?")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(folder)


@given(st.text())
def test_any_text_survives(tokenizer: HuggingFaceTokenizer, text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_ids_are_those_of_transformers(folder: Path, tokenizer: HuggingFaceTokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(str(folder))
    turns = [{"role": m.role, "content": m.content} for m in CHAT]
    for thinking in (False, True):
        text = tokenizer.chat(CHAT, thinking)
        found = theirs.apply_chat_template(
            turns, add_generation_prompt=True, enable_thinking=thinking, return_dict=False
        )
        assert tokenizer.encode(text) == found


def test_a_chat_ends_where_the_answer_begins(tokenizer: HuggingFaceTokenizer) -> None:
    without, with_thought = tokenizer.chat(CHAT, False), tokenizer.chat(CHAT, True)
    assert without.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert with_thought.endswith("<|im_start|>assistant\n")
    assert "Be brief." in without


def test_a_turn_is_one_token_and_gives_no_text(tokenizer: HuggingFaceTokenizer) -> None:
    (end,) = tokenizer.encode(END_OF_TURN)
    assert tokenizer.eos_id == end
    assert tokenizer.decode([*tokenizer.encode("42"), end]) == "42"
    # A thought is part of what the policy says.
    assert tokenizer.decode(tokenizer.encode("<think>x</think>")) == "<think>x</think>"


def test_ids_beyond_the_tokenizer_give_nothing(tokenizer: HuggingFaceTokenizer) -> None:
    """Qwen's embedding has more rows than its tokenizer has tokens."""
    assert tokenizer.decode([*tokenizer.encode("42"), tokenizer.vocab_size + 5]) == "42"


def test_the_models_own_files_say_what_ends_a_text(folder: Path, tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(folder)
    (turn,), (text,) = tokenizer.encode(END_OF_TURN), tokenizer.encode(END_OF_TEXT)
    assert tokenizer.stop_ids == (turn,)  # the tokenizer's own
    assert tokenizer.pad_id == text
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": text}))
    assert HuggingFaceTokenizer(folder, tmp_path).stop_ids == (turn, text)
    settings = {"eos_token_id": [7, turn], "pad_token_id": 9}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    found = HuggingFaceTokenizer(folder, tmp_path)
    assert found.stop_ids == (turn, 7)
    assert found.eos_id == turn
    assert found.pad_id == 9


def test_prompts_take_the_template_where_there_is_one(tokenizer: HuggingFaceTokenizer) -> None:
    problem = Problem("p", "2 + 2?", "", "4")
    prompt = PromptFormat(PromptConfig(instruction="Think."), tokenizer).prompt(problem)
    assert prompt.text == tokenizer.chat([Message("user", "2 + 2? Think.")], False)
    assert list(prompt.tokens) == tokenizer.encode(prompt.text)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        HuggingFaceTokenizer(tmp_path)
    assert_names(caught, str(tmp_path), "holds no tokenizer", "give tokenizer.path")


def test_a_broken_tokenizer_is_refused_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {')
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        HuggingFaceTokenizer(tmp_path)
    assert_names(caught, str(tmp_path), "can't be loaded", "download it again")


def test_a_broken_generation_config_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config\.json can't be read as JSON"):
        HuggingFaceTokenizer(folder, tmp_path)


def test_a_chat_without_a_template_or_against_it_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(ConfigError, match="no chat template"):
        HuggingFaceTokenizer(tmp_path).chat(CHAT, False)
    strict = "{{ raise_exception('roles must alternate') }}"
    write_tokenizer(tmp_path, chat_template=strict)
    with pytest.raises(ConfigError) as caught:
        HuggingFaceTokenizer(tmp_path).chat(CHAT, False)
    assert_names(caught, "['system', 'user']", "roles must alternate")
