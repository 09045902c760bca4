"""What layers in FP8 hold: copies of their weights, and their inputs until backward.

As Transformer Engine 2.20 keeps them (`module/linear.py`): where gradients are computed, weights
are quantized at the first microbatch, along rows for forward and along columns for dgrad, and both
copies stay until a rollout drops them. Of an input the copy for the weight gradient waits for
backward, unless nobody asks for it. Held in passing, and not counted: the copies of what one layer
is at. GPUs from compute capability 10.0 on need no second copy of a weight where a whole tensor has
one scale.
"""

from __future__ import annotations

from proma_megatron.config.constants import DTYPE_BYTES
from proma_megatron.config.fp8 import RECIPES
from proma_megatron.config.run import RunConfig
from proma_megatron.planning.shapes import Stage


def in_fp8(config: RunConfig, layer: int | None) -> bool:
    """Tell whether this layer's linear weights are multiplied in FP8; None: outside all layers."""
    model = config.model
    if model.fp8 == "none" or layer is None:
        return False
    return model.fp8_skip_first <= layer < model.layers - model.fp8_skip_last


def weight_copies(config: RunConfig, stage: Stage) -> int:
    """Return the bytes of FP8 weights on a rank of this stage, scales included."""
    if config.model.fp8 == "none":
        return 0
    return sum(
        2 * RECIPES[config.model.fp8].weight_bytes(weight.count)
        for weight in stage.parameters
        if weight.is_linear and in_fp8(config, weight.layer)
    )


def input_bytes(config: RunConfig, *, of_projection: bool = False) -> float:
    """Return bytes an entry of a linear layer's input takes until backward, in a layer in FP8.

    At most: in a step that compares operands those from before FP8 are kept beside TE's.

    Args:
        of_projection: the input is attention's output, which attention keeps anyway. Megatron has
            it quantized once more in backward, but for delayed scaling.
    """
    compute = DTYPE_BYTES[config.model.dtype]
    if config.model.fp8 == "none" or (of_projection and config.model.fp8 != "delayed"):
        return compute
    quantized = RECIPES[config.model.fp8].input_bytes
    if not config.projects:
        return quantized
    if config.projection.fp8_operands == "fp8":
        return compute + quantized
    return compute  # TE keeps none: its weight is frozen
