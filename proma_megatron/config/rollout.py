"""Keys of completions: how they are sampled, scored and evaluated."""

from __future__ import annotations

from pydantic import Field

from proma_megatron.config.fields import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


class RolloutConfig(Section):
    prompts_per_step: PositiveInt = Field(
        default=16, description="Prompts of an RL step, of all replicas together."
    )
    samples_per_prompt: PositiveInt = Field(
        default=8, description="Completions of each prompt: a group."
    )
    temperature: PositiveFloat = Field(default=1.0, description="Of sampling.")
    top_k: NonNegativeInt = Field(
        default=0, description="Sample from so many most likely tokens; 0: off."
    )
    top_p: Fraction = Field(
        default=1.0,
        description=(
            "Sample from the most likely tokens that have this probability together; 1: off."
        ),
    )
    max_prompt_tokens: PositiveInt = Field(
        default=96, description="Longest prompt; longer ones are dropped."
    )
    max_new_tokens: PositiveInt = Field(default=48, description="Longest completion.")
    batch_size: PositiveInt = Field(
        default=128, description="Sequences that decode at the same time on one replica."
    )
    resampling_rounds: NonNegativeInt = Field(
        default=0,
        description=(
            "Further rounds of prompts in place of groups whose rewards are all equal (DAPO's "
            "dynamic sampling); what is missing after the last round is filled with such "
            "groups. 0: off."
        ),
    )


class RewardConfig(Section):
    """A completion's score, in [0, 1] for the built-in functions, and what is added to it."""

    function: str = Field(
        default="gsm8k",
        description=(
            '"gsm8k": the number after "####"; "math": the last answer in the text, compared '
            'by math-verify; or "package.module:function" of (prompt, completion, reference).'
        ),
    )
    format_bonus: NonNegativeFloat = Field(
        default=0.0, description="Added for an answer in the form asked for, right or wrong."
    )
    format_pattern: str | None = Field(
        default=None, description="Regular expression of that form; null: the function's own."
    )
    overlong_penalty: NonNegativeFloat = Field(
        default=0.0, description="What a completion loses that meets the length limit."
    )
    overlong_buffer: NonNegativeInt = Field(
        default=0, description="Last tokens over which the penalty grows; 0: at once."
    )
    timeout_seconds: PositiveFloat = Field(
        default=5.0, description="For one sample, which scores 0 when it runs out."
    )
    workers: PositiveInt = Field(default=2, description="Scoring processes of a replica.")


class EvaluationConfig(Section):
    """How `proma eval` and validation sample."""

    samples: PositiveInt = Field(default=1, description="Completions of a problem.")
    temperature: NonNegativeFloat | None = Field(
        default=None,
        description="Null: 0 (greedy) for one sample, and rollout.temperature for several.",
    )
    top_k: NonNegativeInt = Field(
        default=0, description="Sample from so many most likely tokens; 0: off."
    )
    top_p: Fraction = Field(
        default=1.0,
        description=(
            "Sample from the most likely tokens that have this probability together; 1: off."
        ),
    )
