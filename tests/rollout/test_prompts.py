"""Prompts walk every epoch exactly once, resume where they stopped, and mask only the prompt."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proma_megatron.config import ConfigError
from proma_megatron.records import Problem, Prompt
from proma_megatron.rollout.prompts import PromptSource, format_prompt
from proma_megatron.rollout.tasks import generate_problems
from proma_megatron.rollout.tokenizer import SentencePieceTokenizer, train_tokenizer

PROBLEMS = generate_problems("train", 60, seed=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    texts = [format_prompt(problem.question) + problem.solution for problem in PROBLEMS]
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "t.model", 320)


class Characters:
    """A tokenizer of code points, without BOS: fast and obvious."""

    vocab_size, pad_id, bos_id, eos_id = 128, 0, None, 1

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: object) -> str:
        raise NotImplementedError


def source(size: int, seed: int = 0) -> PromptSource:
    return PromptSource(PROBLEMS[:size], Characters(), 500, seed)


def ids(prompts: list[Prompt]) -> list[str]:
    return [prompt.problem.id for prompt in prompts]


@given(st.integers(1, 12), st.lists(st.integers(0, 15), max_size=8), st.integers(0, 99))
def test_an_epoch_has_every_problem_exactly_once(size: int, counts: list[int], seed: int) -> None:
    prompts, drawn = source(size, seed), []
    for count in counts:
        taken = ids(prompts.take(count))
        assert len(taken) == count
        drawn += taken
    drawn += ids(prompts.take(-len(drawn) % size))
    everything = sorted(problem.id for problem in PROBLEMS[:size])
    for start in range(0, len(drawn), size):
        assert sorted(drawn[start : start + size]) == everything


@given(st.integers(1, 12), st.integers(0, 40), st.integers(0, 99))
def test_a_restored_source_continues_identically(size: int, before: int, seed: int) -> None:
    uninterrupted = source(size, seed)
    uninterrupted.take(before)
    state = json.loads(json.dumps(uninterrupted.state()))
    resumed = source(size, seed)
    resumed.take(3)  # whatever it did before must not matter
    resumed.restore(state)
    assert ids(resumed.take(30)) == ids(uninterrupted.take(30))
    assert resumed.state() == uninterrupted.state()


def test_how_prompts_are_batched_does_not_change_their_order() -> None:
    one, many = source(60), source(60)
    assert ids(one.take(130)) == [i for _ in range(13) for i in ids(many.take(10))]


def test_order_depends_on_seed_and_epoch() -> None:
    prompts = source(60)
    first, second = ids(prompts.take(60)), ids(prompts.take(60))
    assert first != second
    assert first != ids(source(60, seed=1).take(60))
    assert first != [problem.id for problem in PROBLEMS]
    assert first == ids(source(60).take(60))


@pytest.mark.parametrize(
    ("other", "message"), [(source(60, seed=1), "seed is 0"), (source(59), "problems is 60")]
)
def test_a_state_of_another_stream_is_refused(other: PromptSource, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        source(60).restore(other.state())


def test_prompt_tokens_are_bos_and_the_text(tokenizer: SentencePieceTokenizer) -> None:
    for prompt in PromptSource(PROBLEMS, tokenizer, 96, 0).take(60):
        assert prompt.tokens[0] == tokenizer.bos_id
        assert tokenizer.decode(prompt.tokens) == prompt.text
        assert prompt.problem.question in prompt.text
        assert prompt.problem.answer not in prompt.text.replace(prompt.problem.question, "")
    assert source(1).take(1)[0].tokens == tuple(map(ord, format_prompt(PROBLEMS[0].question)))


def test_a_prompt_that_is_too_long_is_refused_when_the_source_is_built() -> None:
    longest = max(PROBLEMS, key=lambda problem: len(problem.question))
    length = len(format_prompt(longest.question))
    PromptSource(PROBLEMS, Characters(), length, 0)
    with pytest.raises(ConfigError) as error:
        PromptSource([longest], Characters(), length - 1, 0)
    message = str(error.value)
    assert f"'{longest.id}' has {length} tokens" in message
    assert f"max_prompt_tokens={length - 1}" in message
    assert f"raise the limit to at least {length}" in message


def test_no_problems_are_refused() -> None:
    with pytest.raises(ConfigError, match="no problems"):
        PromptSource([], Characters(), 10, 0)


def test_supervised_sequence_trains_on_solution_and_eos_only(
    tokenizer: SentencePieceTokenizer,
) -> None:
    prompts = PromptSource(PROBLEMS, tokenizer, 96, 0)
    for prompt in prompts.take(60):
        sequence = prompts.supervised_sequence(prompt.problem)
        masked = [t for t, m in zip(sequence.tokens, sequence.loss_mask, strict=True) if not m]
        learned = [t for t, m in zip(sequence.tokens, sequence.loss_mask, strict=True) if m]
        assert tuple(masked) == prompt.tokens == sequence.tokens[: len(masked)]
        assert learned[-1] == tokenizer.eos_id
        assert tokenizer.decode(learned[:-1]) == prompt.problem.solution
        assert sequence.loss_tokens == len(learned)
        assert sequence.advantage == 1.0
        assert not any(sequence.old_logprobs)


def test_supervised_tokens_are_those_of_the_whole_text(tokenizer: SentencePieceTokenizer) -> None:
    prompts = PromptSource(PROBLEMS, tokenizer, 96, 0)
    # The generator's solutions start with a digit, which never merges; one from a file may not.
    for problem in [*PROBLEMS, Problem("x", "How many?", "apples: 1\n#### 1", "1")]:
        whole = tokenizer.encode(format_prompt(problem.question) + problem.solution)
        _, *tokens, _ = prompts.supervised_sequence(problem).tokens
        assert tokens == whole


def test_taking_prompts_does_not_move_with_supervised_sequences() -> None:
    prompts = source(60)
    before = prompts.state()
    prompts.supervised_sequence(Problem("x", "q", "#### 1", "1"))
    assert prompts.state() == before
