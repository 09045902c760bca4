"""Keys of the problems, and of the prompts that are made of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from proma_megatron.config.fields import (
    PositiveInt,
    Section,
    UserPath,
)


class PromptConfig(Section):
    """How a question becomes the text that the policy continues."""

    template: Literal["auto", "chat", "plain"] = Field(
        default="auto",
        description=(
            'auto: the tokenizer\'s chat template where it has one, else "Question: ... Answer:".'
        ),
    )
    thinking: bool = Field(default=False, description="A chat template's enable_thinking.")
    system: str | None = Field(
        default=None, description="A system message before the question; null: none."
    )
    instruction: str | None = Field(
        default=None,
        description="Follows a question, after a space; chats of the data stay as they are.",
    )


class ColumnsConfig(Section):
    """Columns of data files; a dot reaches into a column. Null: GSM8K's own, or verl's."""

    prompt: str | None = Field(default=None, description="A text, or chat messages.")
    answer: str | None = Field(default=None, description="The reference answer.")
    solution: str | None = Field(default=None, description="A worked answer, for the warm start.")


class DataConfig(Section):
    train_problems: PositiveInt = Field(
        default=20_000, description="Generated problems to train on, where there is no train_file."
    )
    validation_problems: PositiveInt = Field(
        default=128,
        description="Generated problems to validate on, where there is no validation_file.",
    )
    largest_number: Annotated[int, Field(ge=2)] = Field(
        default=50, description="Largest number in a generated question."
    )
    solution_steps: Literal[1, 2] = Field(
        default=2, description="Lines of arithmetic in a generated solution, at most."
    )
    train_file: UserPath | None = Field(
        default=None, description="JSONL or parquet file of problems, instead of the generator."
    )
    validation_file: UserPath | None = Field(default=None, description="The same for validation.")
    columns: ColumnsConfig = Field(
        default=ColumnsConfig(), description="Columns of the data files."
    )
    seed: int = Field(default=0, description="Seed of generated problems.")
