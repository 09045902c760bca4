"""The configuration of a whole run: its sections, checked against each other."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ValidationInfo, model_validator

from proma_megatron.config.checks import (
    layout_problems,
    precision_problems,
    run_problems,
    training_problems,
)
from proma_megatron.config.choices import ACCUMULATIONS
from proma_megatron.config.fields import Section
from proma_megatron.config.model import ComputeConfig, ModelConfig, ParallelConfig
from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.config.sections import RunSections
from proma_megatron.config.trainer import ProcessConfig
from proma_megatron.errors import ConfigError

TRAINING = {"purpose": "training"}  # validation context: a policy may also only be read


class RunConfig(RunSections):
    """A run: every section, and what their keys must agree on."""

    @model_validator(mode="before")
    @classmethod
    def _own_rule(cls, tree: Any) -> Any:
        """Fill in the algorithm's rule, where the tree names none."""
        if not isinstance(tree, dict):
            return tree
        algorithm = tree.get("algorithm", "proma")
        facts = ACCUMULATIONS.get(algorithm) if isinstance(algorithm, str) else None
        projection = tree.get("projection") or {}
        if facts is None or not isinstance(projection, dict) or "rule" in projection:
            return tree
        return {**tree, "projection": {**projection, "rule": facts.default_rule}}

    @model_validator(mode="after")
    def _check_together(self, info: ValidationInfo) -> RunConfig:
        for problem in layout_problems(self.model, self.parallel):
            raise ValueError(problem)
        for problem in run_problems(self):
            raise ValueError(problem)
        if info.context == TRAINING:
            for problem in training_problems(self):
                raise ValueError(problem)
        return self


class GradientsConfig(Section):
    """What `proma grads` and `proma verify` take as overrides; the names are the run's."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0  # of random weights and batches
    model: ComputeConfig = ComputeConfig()
    parallel: ParallelConfig = ParallelConfig()
    projection: ProjectionConfig = ProjectionConfig()
    trainer: ProcessConfig = ProcessConfig()

    @model_validator(mode="after")
    def _check_together(self) -> GradientsConfig:
        projects = self.projection.active
        for problem in precision_problems(self.model, self.projection, projects=projects):
            raise ValueError(problem)
        return self


def check_data_files(config: RunConfig) -> None:
    """Check that the data files that the configuration names are there; ConfigError if not."""
    for key, path in (
        ("data.train_file", config.data.train_file),
        ("data.validation_file", config.data.validation_file),
    ):
        if path is not None and not path.is_file():
            raise ConfigError(f"{key} is {path}, expected a file that exists; check the path")


def check_model_files(config: RunConfig) -> None:
    """Check that model and tokenizer that the configuration names are there; ConfigError if not."""
    if config.tokenizer.path is not None and not config.tokenizer.path.exists():
        raise ConfigError(
            f"tokenizer.path is {config.tokenizer.path}, which does not exist; check the path"
        )
    path = config.model.path
    if path is not None and not path.is_dir():
        raise ConfigError(
            f"model.path is {path}, expected a directory with a Hugging Face model; download it, "
            f"for example with `hf download Qwen/{path.name} --local-dir {path}`"
        )


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Check that this model can be cut into this layout; ConfigError if not."""
    for problem in layout_problems(model, parallel):
        raise ConfigError(problem)
