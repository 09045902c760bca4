"""Demonstrations of the warm start: worked solutions and guesses."""

from pathlib import Path

import pytest

from proma_megatron.config.data import PromptConfig
from proma_megatron.data.arithmetic import generate_problems
from proma_megatron.data.demonstrations import Demonstrations, demonstration
from proma_megatron.data.prompts import PromptFormat, PromptSource, format_plain
from proma_megatron.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from proma_megatron.types import Problem, Prompt

PROBLEMS = generate_problems("train", 400, seed=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    return train_tokenizer([p.question + "\n" + p.solution for p in PROBLEMS], path, 320)


def prompts(tokenizer: SentencePieceTokenizer) -> list[Prompt]:
    form = PromptFormat(PromptConfig(), tokenizer)
    return [form.prompt(problem) for problem in PROBLEMS]


def completions(tokenizer: SentencePieceTokenizer, guesses: float, seed: int) -> list[str]:
    source = PromptSource(prompts(tokenizer), seed=0)
    return [
        tokenizer.decode(
            [t for t, counts in zip(s.tokens, s.loss_mask, strict=True) if counts][:-1]
        )
        for s in Demonstrations(source, tokenizer, guesses, seed).take(400)
    ]


def test_without_guesses_all_work_is_shown(tokenizer: SentencePieceTokenizer) -> None:
    assert sorted(completions(tokenizer, 0.0, 0)) == sorted(p.solution for p in PROBLEMS)


def test_the_asked_share_skips_the_work(tokenizer: SentencePieceTokenizer) -> None:
    found = completions(tokenizer, 0.5, 0)
    guesses = [text for text in found if text.startswith("####")]
    assert 150 < len(guesses) < 250  # 200 expected, 5 standard deviations
    assert all(len(text.splitlines()) == 1 for text in guesses)


def test_guesses_are_mostly_wrong(tokenizer: SentencePieceTokenizer) -> None:
    source = PromptSource(prompts(tokenizer), seed=0)
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


def test_a_demonstration_trains_on_solution_and_eos_only(
    tokenizer: SentencePieceTokenizer,
) -> None:
    for prompt in prompts(tokenizer)[:60]:
        sequence = demonstration(prompt, prompt.problem.solution, tokenizer)
        masked = [t for t, m in zip(sequence.tokens, sequence.loss_mask, strict=True) if not m]
        learned = [t for t, m in zip(sequence.tokens, sequence.loss_mask, strict=True) if m]
        assert tuple(masked) == prompt.tokens == sequence.tokens[: len(masked)]
        assert learned[-1] == tokenizer.eos_id
        assert tokenizer.decode(learned[:-1]) == prompt.problem.solution
        assert sequence.loss_tokens == len(learned)
        assert sequence.advantage == 1.0
        assert not any(sequence.old_logprobs)


def test_its_tokens_are_those_of_the_whole_text(tokenizer: SentencePieceTokenizer) -> None:
    form = PromptFormat(PromptConfig(), tokenizer)
    # The generator's solutions start with a digit, which never merges; one from a file may not.
    for problem in [*PROBLEMS[:60], Problem("x", "How many?", "apples: 1\n#### 1", "1")]:
        whole = tokenizer.encode(format_plain(problem.question) + problem.solution)
        _, *tokens, _ = demonstration(form.prompt(problem), problem.solution, tokenizer).tokens
        assert tokens == whole
