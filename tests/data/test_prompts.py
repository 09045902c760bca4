"""Prompts walk every epoch exactly once, resume where they stopped, and mask only the prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proma_megatron.config.data import PromptConfig
from proma_megatron.data.arithmetic import generate_problems
from proma_megatron.data.prompts import PromptFormat, PromptSource, drop_long, format_plain
from proma_megatron.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from proma_megatron.errors import ConfigError
from proma_megatron.types import Message, Problem, Prompt

PROBLEMS = generate_problems("train", 60, seed=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    texts = [format_plain(problem.question) + problem.solution for problem in PROBLEMS]
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "t.model", 320)


class Characters:
    """A tokenizer of code points, without BOS: fast and obvious."""

    vocab_size, pad_id, bos_id, eos_id, stop_ids = 128, 0, None, 1, (1,)
    has_chat_template = False

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: object) -> str:
        raise NotImplementedError

    def chat(self, messages: Sequence[Message], thinking: bool) -> str:
        raise ConfigError("no chat template")


FORM = PromptFormat(PromptConfig(), Characters())


def source(size: int, seed: int = 0) -> PromptSource:
    return PromptSource([FORM.prompt(problem) for problem in PROBLEMS[:size]], seed)


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
    form = PromptFormat(PromptConfig(), tokenizer)
    for prompt in PromptSource([form.prompt(problem) for problem in PROBLEMS], 0).take(60):
        assert prompt.tokens[0] == tokenizer.bos_id
        assert tokenizer.decode(prompt.tokens) == prompt.text
        assert prompt.problem.question in prompt.text
        assert prompt.problem.answer not in prompt.text.replace(prompt.problem.question, "")
    assert source(1).take(1)[0].tokens == tuple(map(ord, format_plain(PROBLEMS[0].question)))


def test_long_prompts_are_dropped_and_the_rest_stays_in_order() -> None:
    prompts = [FORM.prompt(problem) for problem in PROBLEMS]
    lengths = sorted(len(prompt.tokens) for prompt in prompts)
    limit = lengths[20]
    kept = drop_long(prompts, limit)
    assert [p for p in prompts if len(p.tokens) <= limit] == kept
    assert 20 < len(kept) < 60
    assert drop_long(prompts, lengths[-1]) == prompts


def test_no_problems_are_refused() -> None:
    with pytest.raises(ConfigError, match="no problems"):
        PromptSource([], 0)


# --------------------------------------------------------------------------- forms


class Chat(Characters):
    """Code points, with a chat template that shows what it was given."""

    has_chat_template = True

    def chat(self, messages: Sequence[Message], thinking: bool) -> str:
        turns = "".join(f"[{m.role}|{m.content}]" for m in messages)
        return f"{turns}[assistant|{'think' if thinking else ''}"


def text(problem: Problem, tokenizer: Characters, **config: object) -> str:
    return PromptFormat(PromptConfig.model_validate(config), tokenizer).prompt(problem).text


QUESTION = Problem("q", "How many?", "", "1")
DIALOGUE = Problem(
    "d", "And now?", "", "1", (Message("system", "Be brief."), Message("user", "And now?"))
)


@pytest.mark.parametrize(
    ("problem", "tokenizer", "config", "expected"),
    [
        (QUESTION, Characters(), {}, "Question: How many?\nAnswer:\n"),
        (
            QUESTION,
            Characters(),
            {"instruction": "Think."},
            "Question: How many? Think.\nAnswer:\n",
        ),
        (QUESTION, Chat(), {"template": "plain"}, "Question: How many?\nAnswer:\n"),
        (QUESTION, Chat(), {}, "[user|How many?][assistant|"),
        (QUESTION, Chat(), {"thinking": True}, "[user|How many?][assistant|think"),
        (
            QUESTION,
            Chat(),
            {"system": "Be kind.", "instruction": "Think."},
            "[system|Be kind.][user|How many? Think.][assistant|",
        ),
        # A chat of the data keeps its own system message, and its own instructions.
        (
            DIALOGUE,
            Chat(),
            {"system": "Be kind.", "instruction": "Think."},
            "[system|Be brief.][user|And now?][assistant|",
        ),
    ],
)
def test_a_problem_becomes_this_text(
    problem: Problem, tokenizer: Characters, config: dict[str, object], expected: str
) -> None:
    assert text(problem, tokenizer, **config) == expected


@pytest.mark.parametrize(
    ("problem", "config", "part"),
    [
        (QUESTION, {"template": "chat"}, "no chat template"),
        (QUESTION, {"system": "Be kind."}, "prompt.system is 'Be kind.'"),
        (DIALOGUE, {}, "problem 'd' is a chat of 2 messages"),
    ],
)
def test_a_form_that_the_tokenizer_does_not_have_is_refused(
    problem: Problem, config: dict[str, object], part: str
) -> None:
    with pytest.raises(ConfigError, match=part):
        text(problem, Characters(), **config)
