"""The run's data: problems of both splits, the tokenizer, and streams of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from proma_megatron.config.run import RunConfig
from proma_megatron.data.arithmetic import generate_problems
from proma_megatron.data.datasets import load_problems
from proma_megatron.data.demonstrations import demonstration
from proma_megatron.data.hf_tokenizer import HuggingFaceTokenizer
from proma_megatron.data.prompts import PromptFormat, PromptSource, drop_long, format_plain
from proma_megatron.data.tokenizer import SentencePieceTokenizer, Tokenizer, train_tokenizer
from proma_megatron.errors import ConfigError
from proma_megatron.types import Problem, Prompt


@dataclass(frozen=True)
class RunData:
    tokenizer: Tokenizer
    train: PromptSource  # RL prompts
    supervised: PromptSource  # the same prompts in another order, for the warm start
    validation: tuple[Prompt, ...]
    notes: tuple[str, ...]  # what was left out, for the user


def prepare_data(config: RunConfig, trained_tokenizer: Path) -> RunData:
    """Read everything that a run reads, and check it.

    Args:
        trained_tokenizer: where a tokenizer is trained from the task's text if the configuration
            names none and there is none yet.

    Raises:
        ConfigError: bad data, or nothing left of it.
    """
    train, validation = load_splits(config)
    texts = (format_plain(p.question) + p.solution for p in train)
    tokenizer = load_tokenizer(config, trained_tokenizer, texts)
    train_prompts, train_note = make_prompts(train, "training", config, tokenizer)
    validation_prompts, validation_note = make_prompts(validation, "validation", config, tokenizer)
    if len(train_prompts) < config.rollout.prompts_per_step:
        raise ConfigError(
            f"there are {len(train_prompts)} training problems, fewer than "
            f"rollout.prompts_per_step={config.rollout.prompts_per_step}; add problems or take "
            "fewer a step"
        )
    return RunData(
        tokenizer=tokenizer,
        train=PromptSource(train_prompts, config.seed),
        supervised=PromptSource(train_prompts, config.seed + 1),
        validation=tuple(validation_prompts),
        notes=tuple(note for note in (train_note, validation_note) if note),
    )


def load_splits(config: RunConfig) -> tuple[list[Problem], list[Problem]]:
    """Return training and validation problems, from the files or from the generator.

    Raises:
        ConfigError: a file that can't be read, is empty, or shares questions with the other split.
    """
    data = config.data
    if data.train_file is not None and data.validation_file is not None:
        train = load_problems(data.train_file, data.columns)
        validation = load_problems(data.validation_file, data.columns)
        # The whole of a chat: many end in the same words.
        questions = ({(p.question, p.messages) for p in split} for split in (train, validation))
        shared = {question for question, _ in set.intersection(*questions)}
        if shared:
            raise ConfigError(
                f"{data.validation_file} shares {len(shared)} questions with {data.train_file}, "
                f"for example '{min(shared)[:80]}'; remove them from one of the two"
            )
        return train, validation
    difficulty = {"largest": data.largest_number, "steps": data.solution_steps}
    return (
        generate_problems("train", data.train_problems, data.seed, **difficulty),
        generate_problems("validation", data.validation_problems, data.seed, **difficulty),
    )


def load_tokenizer(config: RunConfig, trained: Path, texts: Iterable[str]) -> Tokenizer:
    """Return the tokenizer of the configuration, of its model, or one trained on ``texts``.

    Args:
        trained: where the latter is, or is written to.

    Raises:
        ConfigError: there is none, it is broken, or it has more tokens than the embedding has rows.
    """
    path, model = config.tokenizer.path or config.model.path, config.model.path
    if path is None:
        path = trained
        if not path.is_file():
            train_tokenizer(texts, path, config.tokenizer.vocab_size)
    tokenizer: Tokenizer = (
        HuggingFaceTokenizer(path, model) if path.is_dir() else SentencePieceTokenizer(path)
    )
    rows = config.model.vocab_size
    if rows is not None and tokenizer.vocab_size > rows:
        raise ConfigError(
            f"the tokenizer {path} has {tokenizer.vocab_size} tokens, but the embedding has only "
            f"{rows} rows (model.vocab_size); give the tokenizer of this model"
        )
    return tokenizer


def vocabulary(config: RunConfig) -> int:
    """Return the rows of the embedding; before the tokenizer is trained, the most it may have."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    if config.tokenizer.path is not None:
        return load_tokenizer(config, config.tokenizer.path, ()).vocab_size
    return config.tokenizer.vocab_size


def make_prompts(
    problems: Sequence[Problem], which: str, config: RunConfig, tokenizer: Tokenizer
) -> tuple[list[Prompt], str | None]:
    """Return prompts of these problems but for those that are too long, and a note of how many.

    Raises:
        ConfigError: every prompt is too long.
    """
    form = PromptFormat(config.prompt, tokenizer)
    prompts = [form.prompt(problem) for problem in problems]
    limit = config.rollout.max_prompt_tokens
    kept = drop_long(prompts, limit)
    if not kept:
        shortest = min(len(prompt.tokens) for prompt in prompts)
        raise ConfigError(
            f"all {len(prompts)} {which} prompts are longer than rollout.max_prompt_tokens="
            f"{limit}; the shortest has {shortest} tokens, raise the limit"
        )
    dropped = len(prompts) - len(kept)
    if not dropped:
        return kept, None
    longest = max(len(prompt.tokens) for prompt in prompts)
    return kept, (
        f"dropped {dropped:,} of {len(prompts):,} {which} prompts, which are longer than "
        f"rollout.max_prompt_tokens={limit} (the longest has {longest:,} tokens)"
    )


def check_demonstrations(config: RunConfig, data: RunData) -> None:
    """Check that every worked answer fits into a microbatch with its prompt; ConfigError if not.

    It tokenizes all answers, so it runs once a run and not on every rank.
    """
    if not config.warm_start.steps:
        return
    budget = config.batching.tokens_per_microbatch
    for prompt in data.supervised.all():
        problem = prompt.problem
        if not problem.solution:
            raise ConfigError(
                f"problem '{problem.id}' has no worked answer, which warm_start.steps="
                f"{config.warm_start.steps} needs; give data.columns.solution, or no warm start"
            )
        length = len(demonstration(prompt, problem.solution, data.tokenizer).tokens)
        if config.batching.sequences_per_microbatch is None and length > budget:
            raise ConfigError(
                f"the worked answer of problem '{problem.id}' makes a sequence of {length} tokens, "
                f"more than batching.tokens_per_microbatch={budget}; raise the budget or remove "
                "the problem"
            )
