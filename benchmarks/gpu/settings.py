"""What is measured on one GPU: published shapes with random weights, by precision and length."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Literal

from proma_megatron.config.fields import PositiveInt, Section
from proma_megatron.config.model import ModelConfig
from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.config.pretrained import planned_shape
from proma_megatron.config.run import GradientsConfig
from proma_megatron.config.trainer import ProcessConfig
from proma_megatron.errors import ConfigError

Fp8 = Literal["none", "current", "delayed", "blockwise", "mxfp8"]
Recompute = Literal["auto", "none", "full"]

PUBLISHED = {"qwen3-0.6b": "Qwen3-0.6B", "qwen3-8b": "Qwen3-8B"}
TINY = "tiny"  # for the CPU, to try the command
SHAPES = (*PUBLISHED, TINY)
MICROBATCHES = 4  # of a step; nothing is projected in the first


class Setting(Section):
    """One row: a model, its precision, and the microbatches of a step."""

    shape: str
    layers: PositiveInt
    backend: Literal["auto", "torch", "transformer_engine"] = "auto"
    fp8: Fp8 = "none"
    fp8_operands: Literal["bfloat16", "fp8"] = "bfloat16"  # of the projection
    recompute: Recompute = "auto"  # auto: only where it doesn't fit without
    tokens: PositiveInt  # of a sequence
    sequences: PositiveInt  # k, of a microbatch
    microbatches: PositiveInt = MICROBATCHES

    @property
    def name(self) -> str:
        size = f"{self.tokens:,} tokens x {self.sequences} x {self.microbatches}"
        return f"{self.shape}, {self.layers} layers, {precision(self.fp8)}, {size}"

    @property
    def step_tokens(self) -> int:
        return self.tokens * self.sequences * self.microbatches

    def model(self, recompute: Literal["none", "full"]) -> ModelConfig:
        """With its vocabulary."""
        computed = {
            "layers": self.layers,
            "dtype": "bfloat16",
            "backend": self.backend,
            "fp8": self.fp8,
            "recompute": recompute,
        }
        return ModelConfig.model_validate({**shape_named(self.shape), **computed})

    @property
    def projection(self) -> ProjectionConfig:
        return ProjectionConfig(fp8_operands=self.fp8_operands)

    def config(self, device: str) -> GradientsConfig:
        """Of a process that computes so.

        Raises:
            ValueError: precision and operands don't fit each other.
        """
        return GradientsConfig.model_validate(
            {
                "device": device,
                "model": {"dtype": "bfloat16", "backend": self.backend, "fp8": self.fp8},
                "projection": self.projection,
                "trainer": ProcessConfig(timeout_minutes=60),
            }
        )


def precision(fp8: str) -> str:
    return "bf16" if fp8 == "none" else f"FP8 {fp8}"


def shape_named(name: str) -> dict[str, object]:
    """Keys of `ModelConfig`."""
    if name == TINY:
        return {
            "vocab_size": 96,
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 16,
        }
    return planned_shape(Path(PUBLISHED[name]))


def grid(
    shapes: Sequence[str],
    precisions: Sequence[Fp8],
    tokens: Sequence[int],
    *,
    budget: int,
    sequences: int | None = None,
    layers: int | None = None,
    microbatches: int = MICROBATCHES,
    backend: str = "auto",
    fp8_operands: str = "bfloat16",
    recompute: str = "auto",
) -> list[Setting]:
    """All combinations; those of one model follow each other, short sequences first.

    Args:
        budget: tokens of a microbatch; longer sequences come alone.
        sequences: of a microbatch, whatever the budget; None: as many as it holds.
        layers: fewer than the model has; None: all.

    Raises:
        ConfigError: a step without a microbatch that is projected.
    """
    if microbatches < 2:
        raise ConfigError(
            f"--microbatches is {microbatches}, expected at least 2: nothing is projected in the "
            "first"
        )
    return [
        Setting.model_validate(
            {
                "shape": shape,
                "layers": layers or shape_named(shape)["layers"],
                "backend": backend,
                "fp8": fp8,
                "fp8_operands": "bfloat16" if fp8 == "none" else fp8_operands,
                "recompute": recompute,
                "tokens": length,
                "sequences": sequences or max(1, budget // length),
                "microbatches": microbatches,
            }
        )
        for shape, fp8, length in product(shapes, precisions, sorted(set(tokens)))
    ]
