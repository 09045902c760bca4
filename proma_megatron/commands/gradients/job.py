"""What the ranks of one `proma grads` or `proma verify` are told, and what they leave."""

from __future__ import annotations

from pathlib import Path

from proma_megatron.config.fields import PositiveInt, Section
from proma_megatron.config.model import ModelConfig
from proma_megatron.config.run import GradientsConfig


class GradientJob(Section):
    """One projected accumulation, without an optimizer step."""

    config: GradientsConfig
    model: ModelConfig  # its dtype and recompute are the configuration's
    vocab_size: PositiveInt
    weights: Path | None  # a Hugging Face directory; None: random, from the seed
    batch: Path  # as batching.batch_file reads it
    chains: PositiveInt = 1  # replicas whose chains this one replica runs, one after the other
    out: Path  # safetensors, by Hugging Face name
