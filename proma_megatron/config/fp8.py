"""FP8 recipes: what Megatron calls them, and what they ask of GPUs and shapes.

Sources of the figures: Transformer Engine 2.20 (`utils.assert_dim_for_fp8_exec`,
`Float8BlockQuantizer`, `MXFP8Quantizer`, `quantization.check_*_support`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Recipe = Literal["current", "delayed", "blockwise", "mxfp8"]


@dataclass(frozen=True)
class FP8Recipe:
    """What a recipe asks for.

    Attributes:
        megatron: its name in ``TransformerConfig.fp8_recipe``.
        format: E4M3 forward with E5M2 backward (hybrid); scales of blocks are fine enough for E4M3
            in both.
        alignment: what the tokens of a microbatch, and both dimensions of a weight on a rank, are
            multiples of.
        least: compute capability of the first GPUs that have it.
        below: of the first that don't any more.
        cuda: least version that torch is built for.
        block: entries of an input that share a scale; None: all of a tensor.
        weight_block: of a weight.
        scale_bytes: of one of their scales.
    """

    megatron: Literal["tensorwise", "delayed", "blockwise", "mxfp8"]
    format: Literal["hybrid", "e4m3"]
    alignment: int
    least: tuple[int, int]
    below: tuple[int, int] | None = None
    cuda: tuple[int, int] = (12, 1)
    block: int | None = None
    weight_block: int | None = None
    scale_bytes: int = 4

    @property
    def input_bytes(self) -> float:
        """Of one entry of a quantized input, with its share of a scale."""
        return 1 if self.block is None else 1 + self.scale_bytes / self.block

    def weight_bytes(self, entries: int) -> int:
        """Return the bytes of one quantized copy of a weight."""
        scales = 1 if self.weight_block is None else -(-entries // self.weight_block)
        return entries + scales * self.scale_bytes

    def refusal(self, capability: tuple[int, int], cuda: tuple[int, int]) -> str | None:
        """Return what it needs that a GPU or its torch has not; None where all is there."""
        needs = f"compute capability {self.least[0]}.{self.least[1]} or more"
        if self.below is not None:
            needs += f", below {self.below[0]}.{self.below[1]}"
        if capability < self.least or (self.below is not None and capability >= self.below):
            return f"{needs}; this GPU has {capability[0]}.{capability[1]}"
        if cuda < self.cuda:
            return f"CUDA {self.cuda[0]}.{self.cuda[1]} or later; torch has {cuda[0]}.{cuda[1]}"
        return None


RECIPES: dict[Recipe, FP8Recipe] = {
    "current": FP8Recipe("tensorwise", "hybrid", 16, (8, 9)),
    "delayed": FP8Recipe("delayed", "hybrid", 16, (8, 9)),
    "blockwise": FP8Recipe(
        "blockwise", "e4m3", 128, (9, 0), cuda=(12, 9), block=128, weight_block=128 * 128
    ),
    "mxfp8": FP8Recipe(
        "mxfp8", "e4m3", 32, (10, 0), below=(12, 0), block=32, weight_block=32, scale_bytes=1
    ),
}


def token_multiple(fp8: str, tensor: int, *, sequence_parallel: bool) -> int:
    """Return what a microbatch's tokens are padded to a multiple of.

    Under sequence parallelism each rank's share of the tokens is quantized by itself.
    """
    alignment = 1 if fp8 == "none" else RECIPES[fp8].alignment  # type: ignore[index]
    return alignment * (tensor if sequence_parallel else 1)
