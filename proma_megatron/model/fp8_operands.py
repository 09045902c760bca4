"""Operands of FP8 layers as ordinary tensors.

They come from Transformer Engine's backward, whose classes are not named here: the module is used
where it is not installed, too.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch


def high_precision(operand: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return what a weight-gradient GEMM would have read, as an ordinary tensor (T, n).

    Quantized operands can't be cut at the tokens where a sequence ends, and so are read back whole.
    Of two copies, scaled along rows and along columns, the GEMM reads that along columns.
    """
    if type(operand) in (torch.Tensor, torch.nn.Parameter):
        return operand.reshape(-1, operand.shape[-1])
    operand.update_usage(rowwise_usage=False, columnwise_usage=True)
    whole = operand.dequantize(dtype=dtype)
    return whole.reshape(prod(whole.shape[:-1]), whole.shape[-1])


def round_trip(
    quantizer: Any, operand: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``operand`` (T, n) as FP8 has it, in its own dtype.

    Args:
        quantizer: of the layer, Transformer Engine's; it stays as it is.
        scale: that delayed scaling had then; None: the quantizer's.
    """
    own = quantizer.copy()
    own.optimize_for_gemm = False  # which would reorder scales, so that nothing reads them back
    own.set_usage(rowwise=True, columnwise=True)
    if hasattr(own, "with_amax_reduction"):
        own.with_amax_reduction = False  # the operand is gathered: its maximum is everybody's
    if isinstance(getattr(own, "amax", None), torch.Tensor):
        own.scale = own.scale if scale is None else scale
        own.amax = own.amax.clone()  # delayed scaling remembers maxima; this one counted already
    return high_precision(own(operand.contiguous()), operand.dtype)
