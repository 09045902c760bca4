"""The run's data: problems of both splits, the tokenizer, and streams of prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from proma_megatron.config import ConfigError, RunConfig
from proma_megatron.records import Problem
from proma_megatron.rollout.prompts import PromptSource, format_prompt
from proma_megatron.rollout.tasks import generate_problems, load_problems
from proma_megatron.rollout.tokenizer import SentencePieceTokenizer, Tokenizer, train_tokenizer


@dataclass(frozen=True)
class Data:
    tokenizer: Tokenizer
    train: PromptSource  # RL prompts
    supervised: PromptSource  # the same problems in another order, for the warm start
    validation: PromptSource


def load_splits(config: RunConfig) -> tuple[list[Problem], list[Problem]]:
    """Training and validation problems, from the files or from the generator.

    Raises:
        ConfigError: a file that can't be read, is empty, or shares questions with the other split.
    """
    data = config.data
    if data.train_file is not None and data.validation_file is not None:
        train, validation = load_problems(data.train_file), load_problems(data.validation_file)
        shared = {p.question for p in train} & {p.question for p in validation}
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


def prepare_data(config: RunConfig, trained_tokenizer: Path) -> Data:
    """Everything that a run reads, checked: no prompt may exceed the limit.

    Args:
        trained_tokenizer: where a tokenizer is trained from the task's text if the configuration
            names none and there is none yet.

    Raises:
        ConfigError: bad data, or a prompt that is too long.
    """
    train, validation = load_splits(config)
    path = config.tokenizer.path
    if path is None:
        path = trained_tokenizer
        if not path.is_file():
            texts = [format_prompt(p.question) + p.solution for p in train]
            train_tokenizer(texts, path, config.tokenizer.vocab_size)
    tokenizer = SentencePieceTokenizer(path)
    limit = config.rollout.max_prompt_tokens
    if len(train) < config.rollout.prompts_per_step:
        raise ConfigError(
            f"there are {len(train)} training problems, fewer than rollout.prompts_per_step="
            f"{config.rollout.prompts_per_step}; add problems or take fewer a step"
        )
    return Data(
        tokenizer=tokenizer,
        train=PromptSource(train, tokenizer, limit, config.seed),
        supervised=PromptSource(train, tokenizer, limit, config.seed + 1),
        validation=PromptSource(validation, tokenizer, limit, config.seed),
    )


def check_demonstrations(config: RunConfig, data: Data) -> None:
    """Whether every worked answer fits into a microbatch with its prompt; ConfigError if not.

    It tokenizes all answers, so it runs once a run and not on every rank.
    """
    if not config.warm_start.steps:
        return
    budget = config.batching.tokens_per_microbatch
    for prompt in data.supervised.all():
        problem = prompt.problem
        length = len(data.supervised.supervised_sequence(problem).tokens)
        if length > budget:
            raise ConfigError(
                f"the worked answer of problem '{problem.id}' makes a sequence of {length} tokens, "
                f"more than batching.tokens_per_microbatch={budget}; raise the budget or remove "
                "the problem"
            )
