"""What `proma verify` compares: a model and a batch, from a run or a Hugging Face directory."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from proma_megatron.config.loading import gradients_config, load_config
from proma_megatron.config.model import ComputeConfig, ModelConfig, ParallelConfig
from proma_megatron.config.run import GradientsConfig, RunConfig, check_layout
from proma_megatron.config.trainer import ProcessConfig
from proma_megatron.errors import ConfigError
from proma_megatron.types import TrainingSequence
from proma_megatron.weights.huggingface import read_model

logger = logging.getLogger(__name__)

MICROBATCHES = 4  # of each replica, at least


SEQUENCES = (3, 2, 4, 1)  # of the microbatches, in turn


LENGTHS = (6, 24)  # tokens of a sequence


TOKEN_IDS = 24  # different ones


@dataclass(frozen=True)
class Subject:
    """What is verified: a model, where its weights come from, and how it is run."""

    config: GradientsConfig
    model: ModelConfig
    vocab_size: int
    weights: Path | None


def read_subject(source: Path, overrides: Sequence[str]) -> Subject:
    """Read a training configuration, or a Hugging Face directory, with what the user overrides.

    A Hugging Face directory is verified in float64 unless told otherwise. A layout of one process
    becomes two tensor ranks, unless the user asked for it.

    Raises:
        ConfigError: the source can't be read, the user asked for one process, or the model can't
            be cut into the layout.
    """
    if source.is_dir():
        config = gradients_config(["model.dtype=float64", *overrides])
        found = read_model(source, config.model)
        subject = Subject(config, found.model, found.vocab_size, source)
    else:
        subject = _from_run(load_config(source, overrides))
    if subject.config.parallel.world_size == 1:
        if any(item.startswith("parallel.") for item in overrides):
            raise ConfigError(
                "the layout is one process, so there is nothing to compare it with; give one of "
                "more, such as parallel.tensor=2"
            )
        logger.info("the layout is one process; comparing parallel.tensor=2 with it")
        two = subject.config.model_copy(update={"parallel": ParallelConfig(tensor=2)})
        subject = Subject(two, subject.model, subject.vocab_size, subject.weights)
    check_layout(subject.model, subject.config.parallel)
    return subject


def _from_run(run: RunConfig) -> Subject:
    from proma_megatron.data.loading import vocabulary

    config = GradientsConfig(
        device=run.device,
        seed=run.seed,
        model=ComputeConfig.model_validate(
            {key: getattr(run.model, key) for key in ComputeConfig.model_fields}
        ),
        parallel=run.parallel,
        projection=run.projection,
        trainer=ProcessConfig(
            timeout_minutes=run.trainer.timeout_minutes, threads=run.trainer.threads
        ),
    )
    weights = run.model.path if run.model.path is not None and run.model.path.is_dir() else None
    if weights is not None:
        found = read_model(weights, config.model)
        return Subject(config, found.model, found.vocab_size, weights)
    return Subject(config, run.model, vocabulary(run), None)


def random_batch(subject: Subject) -> list[list[TrainingSequence]]:
    """Make microbatches of different numbers of sequences of different lengths.

    Few token ids, from all over the vocabulary: gradients of sequences that have nothing in common
    hardly overlap, and there would be next to nothing to project.
    """
    draw = random.Random(subject.config.seed)
    ids = draw.sample(range(subject.vocab_size), min(TOKEN_IDS, subject.vocab_size))
    parallel = subject.config.parallel
    count = max(MICROBATCHES, parallel.pipeline) * (parallel.data or 1)

    def sequence() -> TrainingSequence:
        length = draw.randint(*LENGTHS)
        prompt = draw.randint(1, length - 2)
        return TrainingSequence(
            tokens=tuple(draw.choices(ids, k=length)),
            loss_mask=tuple(int(at >= prompt) for at in range(length)),
            advantage=draw.gauss(0, 1),
            old_logprobs=(0.0,) * length,
        )

    return [[sequence() for _ in range(SEQUENCES[m % len(SEQUENCES)])] for m in range(count)]
