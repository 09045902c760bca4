"""Demonstrations of the warm start: worked solutions and guesses."""

from pathlib import Path

import pytest

from proma_megatron.rollout.demonstrations import Demonstrations
from proma_megatron.rollout.prompts import PromptSource
from proma_megatron.rollout.tasks import generate_problems
from proma_megatron.rollout.tokenizer import SentencePieceTokenizer, train_tokenizer

PROBLEMS = generate_problems("train", 400, seed=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    return train_tokenizer([p.question + "\n" + p.solution for p in PROBLEMS], path, 320)


def completions(tokenizer: SentencePieceTokenizer, guesses: float, seed: int) -> list[str]:
    source = PromptSource(PROBLEMS, tokenizer, 96, seed=0)
    return [
        tokenizer.decode(
            [t for t, counts in zip(s.tokens, s.loss_mask, strict=True) if counts][:-1]
        )
        for s in Demonstrations(source, guesses, seed).take(400)
    ]


def test_without_guesses_all_work_is_shown(tokenizer: SentencePieceTokenizer) -> None:
    assert sorted(completions(tokenizer, 0.0, 0)) == sorted(p.solution for p in PROBLEMS)


def test_the_asked_share_skips_the_work(tokenizer: SentencePieceTokenizer) -> None:
    found = completions(tokenizer, 0.5, 0)
    guesses = [text for text in found if text.startswith("####")]
    assert 150 < len(guesses) < 250  # 200 expected, 5 standard deviations
    assert all(len(text.splitlines()) == 1 for text in guesses)


def test_guesses_are_mostly_wrong(tokenizer: SentencePieceTokenizer) -> None:
    source = PromptSource(PROBLEMS, tokenizer, 96, seed=0)
    answers = [p.problem.answer for p in source.take(400)]
    found = completions(tokenizer, 0.9, 0)
    guesses = [
        text == f"#### {answer}"
        for text, answer in zip(found, answers, strict=True)
        if text.startswith("####")
    ]
    assert sum(guesses) < 0.2 * len(guesses)


def test_the_same_seed_gives_the_same_demonstrations(tokenizer: SentencePieceTokenizer) -> None:
    assert completions(tokenizer, 0.5, 3) == completions(tokenizer, 0.5, 3)
    assert completions(tokenizer, 0.5, 3) != completions(tokenizer, 0.5, 4)
