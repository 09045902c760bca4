"""Megatron's layers, able to hand (X, dY) to a gradient sink instead of computing weight gradients.

With ``sink = None`` every layer is Megatron's own. With a sink, backward computes input gradients
as Megatron does (same collectives) and gives the two factors of the weight gradient to the sink,
which owns ``main_grad`` from then on; autograd sees no weight gradient at all.

The model's forward must stay free of side effects on the sink: under 1F1B forwards run ahead of
backwards, and recompute runs a forward inside a backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig


class Operands(NamedTuple):
    """The two factors of a linear layer's weight gradient ``dY^T X``."""

    x: torch.Tensor  # (T, in)
    dy: torch.Tensor  # (T, out)


class GradientSink(Protocol):
    """A receiver of the factors of weight gradients in backward; T counts all packed tokens.

    Of layers that compute in FP8 it says what it wants, in forward and in backward.
    """

    @property
    def in_bfloat16(self) -> bool:
        """Operands are to be what they were before FP8."""
        ...

    @property
    def compares(self) -> bool:
        """Some microbatch of this step is to be compared in both precisions."""
        ...

    @property
    def compares_now(self) -> bool:
        """That microbatch's backward runs."""
        ...

    def compare(self, weight: torch.Tensor, high: Operands, low: Operands) -> None:
        """Take operands as they were before FP8, and as FP8 has them; `linear` comes next."""

    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, dy: torch.Tensor
    ) -> None:
        """Take ``x`` (T, in) and ``dy`` (T, out) of ``y = x W^T + b``, of the whole sequence."""

    def scale(self, weight: torch.Tensor, x: torch.Tensor, dy: torch.Tensor) -> None:
        """Take ``x`` and ``dy`` (T or T/tp, ..., h) of ``y = x * w``; tokens lead."""

    def embedding(self, weight: torch.Tensor, rows: torch.Tensor, dy: torch.Tensor) -> None:
        """Take ``rows`` (T,) of the local table, -1 for other ranks' tokens, and ``dy`` (T, h)."""


class _Linear(torch.autograd.Function):
    """``x W^T + b`` of a column- or row-parallel layer whose weight gradient goes to a sink."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        sink: GradientSink,
        tp_group: dist.ProcessGroup | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias, ctx.sink, ctx.tp_group = bias, sink, tp_group
        ctx.allreduce_dgrad, ctx.sequence_parallel = allreduce_dgrad, sequence_parallel
        if sequence_parallel:
            x, _ = gather_sequence(x, tp_group)
        y = torch.matmul(x, weight.t())
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        x, weight = ctx.saved_tensors
        gathering = None
        full_x = x
        if ctx.sequence_parallel:
            full_x, gathering = gather_sequence(x, ctx.tp_group, async_op=True)
        dx = dy.matmul(weight)
        reducing = None
        if ctx.allreduce_dgrad:
            reducing = dist.all_reduce(dx, group=ctx.tp_group, async_op=True)
        elif ctx.sequence_parallel:
            scattered = torch.empty_like(x)
            reducing = dist.reduce_scatter_tensor(scattered, dx, group=ctx.tp_group, async_op=True)
            dx = scattered
        if gathering is not None:
            gathering.wait()
        ctx.sink.linear(weight, ctx.bias, full_x.flatten(0, -2), dy.flatten(0, -2))
        if reducing is not None:
            reducing.wait()
        return dx, None, None, None, None, None, None


def gather_sequence(
    x: torch.Tensor, group: dist.ProcessGroup | None, async_op: bool = False
) -> tuple[torch.Tensor, Any]:
    """Gather (T/tp, ...) to (T, ...), in a fresh buffer that the sink may keep past this backward.

    Returns:
        The buffer, and what to wait for if ``async_op``.
    """
    assert group is not None
    full = x.new_empty((x.shape[0] * dist.get_world_size(group), *x.shape[1:]))
    handle = dist.all_gather_into_tensor(full, x.contiguous(), group=group, async_op=async_op)
    return full, handle


class CapturedColumnLinear(ColumnParallelLinear):
    """Column-parallel linear layer; `sink` takes over its weight gradient when set."""

    sink: GradientSink | None = None

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any):
        if self.sink is None or not weight.requires_grad:
            return super()._forward_impl(input, weight, *args, **kwargs)
        return _Linear.apply(
            input,
            weight,
            kwargs["bias"],
            self.sink,
            kwargs["tp_group"],
            kwargs["allreduce_dgrad"],
            kwargs["sequence_parallel"],
        )


class CapturedRowLinear(RowParallelLinear):
    """Row-parallel linear layer; `sink` takes over its weight gradient when set."""

    sink: GradientSink | None = None

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any):
        if self.sink is None or not weight.requires_grad:
            return super()._forward_impl(input, weight, *args, **kwargs)
        return _Linear.apply(input, weight, None, self.sink, None, False, False)


class _Scale(torch.autograd.Function):
    """``x * w`` whose weight gradient goes to a sink."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, sink: GradientSink
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sink = sink
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        x, weight = ctx.saved_tensors
        ctx.sink.scale(weight, x, dy)
        return dy * weight, None, None


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last axis, computed in float32 or better as Qwen's is.

    Megatron's own torch norm refuses sequence parallelism. ``weight.sequence_parallel`` tells
    ``finalize_model_grads`` that each rank holds a partial gradient.
    """

    sink: GradientSink | None = None

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        normalized = F.rms_norm(wide, (x.shape[-1],), None, self.eps).to(x.dtype)
        if self.sink is None:
            return normalized * self.weight
        return _Scale.apply(normalized, self.weight, self.sink)  # type: ignore[return-value]


class _Lookup(torch.autograd.Function):
    """Rows of a table; the table's gradient goes to a sink as (rows, dY)."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, sink: GradientSink
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.sink = sink
        out = F.embedding(rows.clamp(min=0), weight)
        return out.masked_fill_((rows < 0).unsqueeze(-1), 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        rows, weight = ctx.saved_tensors
        ctx.sink.embedding(weight, rows.flatten(), dy.flatten(0, -2))
        return None, None, None


class CapturedEmbedding(VocabParallelEmbedding):
    """Vocabulary-parallel embedding; `sink` takes over its gradient when set.

    The lookup is captured before the scatter over the sequence, so the sink sees every token.
    """

    sink: GradientSink | None = None

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        if self.sink is None:
            return super().forward(input_)
        local = input_ - self.vocab_start_index
        local = local.masked_fill(
            (input_ < self.vocab_start_index) | (input_ >= self.vocab_end_index), -1
        )
        out: torch.Tensor = _Lookup.apply(local, self.weight, self.sink)  # type: ignore[assignment]
        if self.reduce_scatter_embeddings:
            out = out.transpose(0, 1).contiguous()
            return reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
        if dist.get_world_size(self.tp_group) > 1:  # type: ignore[arg-type]
            return reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        return out


class _BackwardMark(torch.autograd.Function):
    """Identity that says, when backward starts here, which microbatch it belongs to."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, begin: Any) -> torch.Tensor:
        ctx.begin = begin
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.begin()
        return grads[0], None


def mark_backward(output: torch.Tensor, begin: Any) -> torch.Tensor:
    """Return ``output`` unchanged; ``begin()`` runs when its backward starts."""
    return _BackwardMark.apply(output, begin)  # type: ignore[return-value]


def captured_layers(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers that can hand over their gradients, whosever kernels they use."""
    return [layer for layer in module.modules() if hasattr(layer, "sink")]
