"""Keys of the run itself: optimizer, warm start, processes, steps, checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from proma_megatron.config.fields import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


class OptimizerConfig(Section):
    lr: PositiveFloat = Field(default=1e-3, description="Learning rate of RL, after its warmup.")
    min_lr: NonNegativeFloat = Field(default=0.0, description="Where a decay ends.")
    warmup_steps: NonNegativeInt = Field(
        default=0, description="Optimizer steps over which the rate rises from 0."
    )
    decay: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="How the rate falls after the warmup."
    )
    weight_decay: NonNegativeFloat = Field(default=0.0, description="AdamW's.")
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="Decay of Adam's first moment."
    )
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.95, description="Decay of Adam's second moment."
    )
    eps: PositiveFloat = Field(
        default=1e-8, description="Added to the root of Adam's second moment."
    )
    clip_grad: NonNegativeFloat = Field(
        default=1.0, description="Largest norm of the gradient; 0: off."
    )
    distributed: bool = Field(
        default=False, description="Shard optimizer state over data-parallel ranks."
    )


class WarmStartConfig(Section):
    """Supervised steps on worked answers before RL; 0 steps start RL from the initial weights."""

    steps: NonNegativeInt = Field(default=0, description="Supervised steps; 0: none.")
    sequences_per_step: PositiveInt = Field(default=64, description="Demonstrations of a step.")
    guesses: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Share of demonstrations without the work."
    )
    lr: PositiveFloat = Field(default=2e-3, description="Learning rate, after its warmup.")
    warmup_steps: NonNegativeInt = Field(
        default=10, description="Steps over which the rate rises from 0."
    )
    decay: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="How the rate falls after the warmup."
    )


class ProcessConfig(Section):
    """The worker processes."""

    timeout_minutes: PositiveFloat = Field(
        default=10.0, description="Longest time of one collective."
    )
    threads: PositiveInt = Field(
        default=1, description="CPU threads per process, where there is no GPU."
    )


class PhaseMinutes(Section):
    """How long a phase may take before the run is taken for hung, and ends; null: for ever.

    Each time that it is entered: a rollout of one round of prompts, one step of the warm start.
    """

    setup: PositiveFloat | None = Field(
        default=60.0, description="Tokenizer, data, model, weights."
    )
    warm_start: PositiveFloat | None = Field(default=60.0, description="One supervised step.")
    rollout: PositiveFloat | None = Field(
        default=120.0, description="Sampling of one round of prompts."
    )
    score: PositiveFloat | None = Field(
        default=60.0, description="Rewards of one round of prompts."
    )
    reference: PositiveFloat | None = Field(
        default=60.0, description="Log-probabilities of other policies."
    )
    train: PositiveFloat | None = Field(
        default=120.0, description="Passes and optimizer steps of an RL step."
    )
    kl: PositiveFloat | None = Field(
        default=60.0, description="Divergences of a step, also to the lagged policy."
    )
    validation: PositiveFloat | None = Field(default=120.0, description="One validation.")
    save: PositiveFloat | None = Field(default=60.0, description="One checkpoint.")


class TrainerConfig(ProcessConfig):
    steps: NonNegativeInt = Field(default=50, description="RL steps; 0: only the warm start.")
    max_minutes: PositiveFloat | None = Field(
        default=None,
        description=(
            "Minutes since the start after which the run has saved and stopped; exit code 75. "
            "Null: none."
        ),
    )
    phase_minutes: PhaseMinutes = Field(
        default=PhaseMinutes(), description="How long a phase may take."
    )
    eval_every: NonNegativeInt = Field(
        default=20,
        description="Steps between accuracies on the validation split; 0: only before and after.",
    )
    kl_every: NonNegativeInt = Field(
        default=1,
        description=(
            "Steps between measurements of the KL to the policy that RL started from, a "
            "forward pass each; 0: only at the end."
        ),
    )
    kl_step_every: NonNegativeInt = Field(
        default=0,
        description=(
            "Steps between measurements of the KL from before a step to after it, a forward "
            "pass each; 0: never."
        ),
    )
    kl_lagged_every: NonNegativeInt = Field(
        default=0,
        description=(
            "Steps between measurements of the KL to the mean of the weights of the last "
            "lag_steps steps, a forward pass each and a copy in host memory; 0: never."
        ),
    )
    lag_steps: PositiveInt = Field(default=40, description="Steps that this mean is over.")
    save_every: NonNegativeInt = Field(
        default=0,
        description="Steps between checkpoints; 0: only before RL and after the last step.",
    )
    save_in_background: bool = Field(
        default=True, description="Train on while a checkpoint is written; false: wait for it."
    )
    keep_last: PositiveInt | None = Field(
        default=None, description="Complete checkpoints that stay; null: all."
    )
    keep_best: NonNegativeInt = Field(
        default=0,
        description=(
            "Checkpoints with the highest validation accuracy, which also stay; 1 or more: "
            "save each new best."
        ),
    )
    max_skipped_steps: PositiveInt = Field(
        default=5,
        description=(
            "Stop after so many steps in a row whose gradients were not finite, with a "
            "checkpoint from before the first of them."
        ),
    )
    log_samples: NonNegativeInt = Field(
        default=4, description="Rollouts written to samples.jsonl each step."
    )
    profile: bool = Field(
        default=False,
        description=(
            "Write where the time goes to logs/: seconds by phase (profile.txt), and a torch "
            "profiler trace of the second RL step, or of the only one. Changes no result."
        ),
    )
