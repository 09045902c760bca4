"""The sections of a configuration in one record, and what follows from several of them.

Keys are defined beside what they are for: `model`, `data`, `rollout`, `objective`, `trainer`;
`checks` and `combinations` say what keys must agree on, `run` joins them, and `loading.load_config`
reads a configuration from YAML. Every failure is a `ConfigError` of one sentence that names the
value, what was expected and the fix.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from proma_megatron.config.choices import ACCUMULATIONS, ESTIMATORS
from proma_megatron.config.data import DataConfig, PromptConfig
from proma_megatron.config.fields import Algorithm, Section, UserPath
from proma_megatron.config.model import ModelConfig, ParallelConfig, TokenizerConfig
from proma_megatron.config.objective import (
    AdvantageConfig,
    BatchingConfig,
    LossConfig,
    ProjectionConfig,
)
from proma_megatron.config.rollout import EvaluationConfig, RewardConfig, RolloutConfig
from proma_megatron.config.trainer import OptimizerConfig, TrainerConfig, WarmStartConfig

# What the configuration names need not be there for it to be valid: a run can be planned before its
# data are.


class RunSections(Section):
    """Every key of a run, each section checked by itself; `run.RunConfig` checks them together."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="Of the run: its directory is root/name."
    )
    root: UserPath = Field(default=Path("runs"), description="Directory of run directories.")
    seed: int = Field(
        default=0,
        description="Seed of random weights, the order of prompts, sampling and the warm start.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Where ranks compute; auto: on GPUs where each rank of a node can have one.",
    )
    algorithm: Algorithm = Field(
        default="proma", description="What the run is made of, see the guide's page on algorithms."
    )
    model: ModelConfig = Field(
        default=ModelConfig(), description="Shape, weights, and how they are computed."
    )
    parallel: ParallelConfig = Field(
        default=ParallelConfig(), description="Layout: how the policy is cut over ranks."
    )
    tokenizer: TokenizerConfig = Field(
        default=TokenizerConfig(), description="What turns text into tokens."
    )
    prompt: PromptConfig = Field(
        default=PromptConfig(), description="How a question becomes a prompt."
    )
    data: DataConfig = Field(
        default=DataConfig(), description="Problems to train and to validate on."
    )
    rollout: RolloutConfig = Field(
        default=RolloutConfig(), description="How completions are sampled in training."
    )
    reward: RewardConfig = Field(default=RewardConfig(), description="How a completion is scored.")
    advantage: AdvantageConfig = Field(
        default=AdvantageConfig(), description="How rewards become advantages."
    )
    loss: LossConfig = Field(default=LossConfig(), description="The policy loss.")
    projection: ProjectionConfig = Field(
        default=ProjectionConfig(), description="What happens to gradients while they accumulate."
    )
    batching: BatchingConfig = Field(
        default=BatchingConfig(), description="How sequences become minibatches and microbatches."
    )
    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(), description="Megatron's Adam, and its learning rate in RL."
    )
    warm_start: WarmStartConfig = Field(
        default=WarmStartConfig(), description="Supervised steps before RL."
    )
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(), description="Sampling of `proma eval` and of validation."
    )
    trainer: TrainerConfig = Field(
        default=TrainerConfig(), description="Steps, measurements, checkpoints, limits."
    )

    @property
    def run_dir(self) -> Path:
        return self.root / self.name

    @property
    def projects(self) -> bool:
        """Whether weight gradients go through the accumulator."""
        return self.algorithm in ACCUMULATIONS and self.projection.active

    @property
    def max_sequence_length(self) -> int:
        return self.rollout.max_prompt_tokens + self.rollout.max_new_tokens


def loss_kind(config: RunSections) -> str:
    """Return the policy loss of this run."""
    if config.loss.kind is not None:
        return config.loss.kind
    return "reinforce" if config.algorithm in ACCUMULATIONS else config.algorithm


def normalizes_std(config: RunSections) -> bool:
    """Tell whether advantages are divided by a standard deviation."""
    chosen = config.advantage.normalize_std
    return ESTIMATORS[config.advantage.estimator].normalizes if chosen is None else chosen
