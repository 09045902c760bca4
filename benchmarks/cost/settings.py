"""What is measured: settings of the cost benchmark, and the model that they share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from proma_megatron.config.fields import PositiveInt, Section
from proma_megatron.config.model import ModelConfig
from proma_megatron.errors import ConfigError

# Accumulation by Megatron, by us, and by hooks that keep a microbatch's gradients or a module's.
WAYS = ("plain", "proma", "hooks", "hooks_by_layer")
VOCABULARY = 4096
MICROBATCHES = 4  # of a step; nothing is projected in the first


class Shape(Section):
    """The size of the model; heads are of 64 entries, two of them to a key head."""

    hidden: PositiveInt = 512
    layers: PositiveInt = 4
    vocabulary: PositiveInt = VOCABULARY

    def model(self, *, tied: bool, dtype: str = "float32") -> ModelConfig:
        """
        Raises:
            ConfigError: the hidden size does not make up whole heads.
        """
        if self.hidden % 128:
            raise ConfigError(
                f"the hidden size is {self.hidden}, expected a multiple of 128: two heads of 64 to "
                "a key head"
            )
        return ModelConfig.model_validate(
            {
                "hidden_size": self.hidden,
                "ffn_hidden_size": 3 * self.hidden,
                "layers": self.layers,
                "heads": self.hidden // 64,
                "kv_heads": self.hidden // 128,
                "head_dim": 64,
                "tie_embeddings": tied,
                "dtype": dtype,
            }
        )


class Setting(Section):
    """One row of the results: a model, a layout, and the microbatches of a step."""

    tensor: PositiveInt
    tied: bool
    tokens: PositiveInt  # of a sequence
    sequences: PositiveInt  # k, of a microbatch
    microbatches: PositiveInt = MICROBATCHES
    shape: Shape = Shape()

    @property
    def name(self) -> str:
        ends = "tied" if self.tied else "untied"
        size = f"{self.tokens:>4} tokens x {self.sequences:>2} x {self.microbatches}"
        wide = "" if self.shape == Shape() else f", hidden {self.shape.hidden}"
        return f"TP {self.tensor}, {ends}{wide}, {size}"


class Effort(Section):
    """How many rounds a setting gets, and of which ways.

    At least ``least``, then on for ``seconds``, at most ``most``. Rounds that take long scatter
    little: after ``limit`` seconds two are enough.
    """

    ways: tuple[str, ...] = WAYS
    seconds: float = 20.0
    least: PositiveInt = 5
    most: PositiveInt = 15
    limit: float = 120.0

    def enough(self, rounds: int, seconds: float) -> bool:
        """Whether to stop after so many rounds and seconds."""
        if rounds >= self.most:
            return True
        wanted = min(2, self.least) if seconds > self.limit else self.least
        return rounds >= wanted and seconds > self.seconds


def grid(
    tensor: Sequence[int],
    tied: Sequence[bool],
    tokens: Sequence[int],
    sequences: Sequence[int],
    microbatches: int = MICROBATCHES,
    shape: Shape | None = None,
) -> list[Setting]:
    """All combinations; those of one process group, and in it of one model, follow each other.

    Raises:
        ConfigError: a step without a microbatch that is projected.
    """
    if microbatches < 2:
        raise ConfigError(
            f"--microbatches is {microbatches}, expected at least 2: nothing is projected in the "
            "first"
        )
    common: dict[str, Any] = {"microbatches": microbatches, "shape": shape or Shape()}
    return [
        Setting(tensor=size, tied=ends, tokens=length, sequences=k, **common)
        for size, ends, length, k in product(tensor, tied, tokens, sequences)
    ]
