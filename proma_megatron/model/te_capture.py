"""Transformer Engine's linear layers and attention in the policy; imported only where TE is there.

X and dY reach the sink in one of two ways.

- Through the weight-gradient store, where operands are what the layer computes with: in bfloat16,
  or in FP8 with ``projection.fp8_operands=fp8``. TE's backward can leave a weight gradient to a
  store: it puts X and dY there, gathered over the sequence, with a function that would compute
  ``dY^T X``. `SinkStore` hands both to the sink at once and never calls the function. TE asks the
  store in forward, so a sink must be set before.
- Through a `_Tap`, where the layer computes in FP8 and the projection wants bfloat16. For TE the
  weight is frozen then: it keeps no X and, without a bias, no second copy of dY. The tap keeps X as
  it came and takes dY from the output.

TE has a quantizer for the second purpose, too (hybrid: FP8 for one GEMM, bfloat16 for the other),
but under sequence parallelism with a scale a tensor its X is rounded to FP8 first: it is gathered
from the FP8 copy (tests/te/test_fp8.py shows it).

The store is TE's internal interface: `extras.TE_TESTED` pins the version, and `check_capture`
proves at start that every weight arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TERowParallelLinear,
)
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.transformer import TransformerConfig
from transformer_engine.pytorch.constants import (  # type: ignore[import-not-found]
    FP8BwdTensorIdx,
    FP8FwdTensorIdx,
)
from transformer_engine.pytorch.quantization import (  # type: ignore[import-not-found]
    FP8GlobalStateManager,
)

from proma_megatron.model.attention import CoreAttention, PackedLayout
from proma_megatron.model.capture import GradientSink, Operands, gather_sequence
from proma_megatron.model.fp8_operands import high_precision, round_trip


class SinkStore:
    """A stand-in for TE's ``wgrad_store``, which hands over instead of storing."""

    def __init__(self, layer: CapturedTELinear) -> None:
        self._layer = layer

    def delay_wgrad_compute(self) -> bool:
        return self._layer.captures

    def put(self, operands: Sequence[Any], compute: Any) -> None:
        """Take X (T, ..., in) and dY (T, out), plain or quantized, when backward has both."""
        self._layer.receive(*operands)


class CapturedTELinear:
    """What the column- and the row-parallel layer share, on TE's side."""

    sink: GradientSink | None = None
    # Of TE's Linear:
    weight: torch.nn.Parameter
    bias: torch.Tensor
    use_bias: bool
    sequence_parallel: bool
    parallel_mode: str
    tp_group: Any
    activation_dtype: torch.dtype
    quantizers: dict[str, Any]
    fp8_meta: dict[str, Any]
    _fp8_workspaces: dict[str, Any]
    fp8_meta_tensors_initialized: bool
    init_fp8_meta_tensors: Callable[[Any], None]
    config: TransformerConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.wgrad_store = SinkStore(self)
        self._frozen = False  # within forward: TE is to compute no weight gradient
        self._calling: _Call | None = None  # within forward: the call, if it is tapped
        self._tapped: _Call | None = None  # within backward: the call that it belongs to

    @property
    def captures(self) -> bool:
        return self.sink is not None and self.weight.requires_grad

    def forward(self, x: torch.Tensor) -> Any:
        sink = self.sink
        self._tapped = None  # a backward may have been broken off
        tapped = (
            sink is not None
            and self.captures
            and torch.is_grad_enabled()
            and FP8GlobalStateManager.is_fp8_enabled()
            and (sink.in_bfloat16 or sink.compares)
        )
        if not tapped:
            return super().forward(x)  # type: ignore[misc]
        assert sink is not None
        call = _Call(self, x.detach())
        self._frozen, self._calling = sink.in_bfloat16, call
        try:
            out, bias = super().forward(_Tap.apply(x, call))  # type: ignore[misc]
        finally:
            self._frozen, self._calling = False, None
        out.register_hook(call.note)
        return out, bias

    def _get_weight_and_bias_tensors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = super()._get_weight_and_bias_tensors()  # type: ignore[misc]
        if self.captures and bias is not None:
            bias = bias.detach()  # its gradient is the sink's
        return (weight.detach() if self._frozen else weight), bias

    def _get_quantizers(self, *args: Any) -> Any:
        found = super()._get_quantizers(*args)  # type: ignore[misc]
        if self._calling is not None:
            self._calling.x_scale = _scale(found[0])
        if self.captures and not self._frozen:
            # For a GEMM scales would be reordered, and nothing reads such operands back.
            for quantizer in found:
                if quantizer is not None:
                    quantizer.optimize_for_gemm = False
        return found

    def remembered(self) -> list[torch.Tensor]:
        """Return TE's own tensors of scales and largest values, forward and backward."""
        if not self.fp8_meta_tensors_initialized:  # TE waits for the first forward
            self.fp8_meta["num_gemms"] = 1
            self.init_fp8_meta_tensors(get_fp8_recipe(self.config))
        states = (self.fp8_meta["scaling_fwd"], self.fp8_meta["scaling_bwd"])
        return [found for state in states for found in (state.scale, state.amax_history)]

    def drop_copies(self) -> None:
        """Free the FP8 copies of the weight; the next first microbatch makes new ones anyway."""
        self._fp8_workspaces.clear()

    def get_extra_state(self) -> None:
        """Return nothing, as Megatron's own layers do, so that checkpoints are alike.

        TE would pickle what delayed scaling remembers, and read no such thing; see `remembered`.
        """

    def set_extra_state(self, state: Any) -> None:
        """Do nothing: there is no such state."""

    # ------------------------------------------------------------------ backward

    def begin(self, call: _Call) -> None:
        self._tapped = call

    def receive(self, x: Any, dy: Any) -> None:
        """Take what TE's backward has for a weight gradient."""
        dtype = self.activation_dtype
        operands = Operands(high_precision(x, dtype), high_precision(dy, dtype))
        if self._tapped is None:
            self.hand_over(operands)
        else:
            self._tapped.trained = operands  # both are compared when the other is there

    def finish(self, call: _Call, originals: Operands) -> None:
        """End TE's backward of this call, with the operands as they were before FP8."""
        assert self.sink is not None
        self._tapped = None
        trained = call.trained or originals
        if self.sink.compares_now:
            low = call.trained or self._quantized(originals, call.x_scale, call.dy_scale)
            self.sink.compare(self.weight, originals, low)
        self.hand_over(trained)

    def hand_over(self, operands: Operands) -> None:
        assert self.sink is not None
        bias = self.bias if self.use_bias else None
        self.sink.linear(self.weight, bias, operands.x, operands.dy)

    def _quantized(
        self, originals: Operands, x_scale: torch.Tensor | None, dy_scale: torch.Tensor | None
    ) -> Operands:
        return Operands(
            round_trip(
                self.quantizers["scaling_fwd"][FP8FwdTensorIdx.GEMM1_INPUT], originals.x, x_scale
            ),
            round_trip(self.gradient_quantizer, originals.dy, dy_scale),
        )

    @property
    def gradient_quantizer(self) -> Any:
        return self.quantizers["scaling_bwd"][FP8BwdTensorIdx.GRAD_OUTPUT1]


def _scale(quantizer: Any) -> torch.Tensor | None:
    """Copy the scale that it quantizes with now, if its recipe has one; that moves on in place."""
    scale = getattr(quantizer, "scale", None)
    return scale.clone() if isinstance(scale, torch.Tensor) else None


class _Call:
    """One forward of a layer whose X and dY are taken as they are before FP8."""

    def __init__(self, layer: CapturedTELinear, x: torch.Tensor) -> None:
        self.layer = layer
        self.trained: Operands | None = None  # what TE has handed over, if it has
        self.x_scale: torch.Tensor | None = None  # where a recipe remembers it
        self.dy_scale: torch.Tensor | None = None
        self._x: torch.Tensor | None = x
        self._dy: torch.Tensor | None = None
        self._gathering: Any = None

    def note(self, dy: torch.Tensor) -> None:
        """Take the output's gradient; TE's backward comes next, beside which the gathering runs."""
        layer, x = self.layer, self._x
        assert x is not None
        assert layer.sink is not None
        if not (layer.sink.in_bfloat16 or layer.sink.compares_now):
            self._x = None  # another microbatch is compared
            return
        if layer.sequence_parallel and layer.parallel_mode == "column":
            x, self._gathering = gather_sequence(x, layer.tp_group, async_op=True)
        elif layer.sequence_parallel:
            dy, self._gathering = gather_sequence(dy, layer.tp_group, async_op=True)
        self._x, self._dy = x, dy
        self.dy_scale = _scale(layer.gradient_quantizer)
        layer.begin(self)

    def finish(self) -> None:
        """Hand over, as the input's gradient is there."""
        x, dy = self._x, self._dy
        self._x = self._dy = None
        if x is None or dy is None:
            return  # TE has handed over
        if self._gathering is not None:
            self._gathering.wait()
        self.layer.finish(self, Operands(x.flatten(0, -2), dy.flatten(0, -2)))


class _Tap(torch.autograd.Function):
    """Identity at a layer's input, whose backward is the end of the layer's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: _Call) -> torch.Tensor:
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.call.finish()
        return grads[0], None


class CapturedTEColumnLinear(CapturedTELinear, TEColumnParallelLinear):
    """TE's column-parallel linear layer; `sink` takes over its weight gradient when set."""


class CapturedTERowLinear(CapturedTELinear, TERowParallelLinear):
    """TE's row-parallel linear layer; `sink` takes over its weight gradient when set."""


class _PackedAttention(TEDotProductAttention):
    """Without what TE would add to a checkpoint; ours over torch adds nothing."""

    get_extra_state = torch.nn.Module.get_extra_state
    set_extra_state = torch.nn.Module.set_extra_state


class TECoreAttention(CoreAttention):
    """TE's attention over packed sequences; ours over the cache of a rollout."""

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config)
        self.packed = _PackedAttention(config, **kwargs)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not isinstance(packed_seq_params, PackedLayout):
            return super().forward(query, key, value, attention_mask)
        return self.packed(
            query, key, value, attention_mask, packed_seq_params=packed_seq_params, **kwargs
        )


TE_LINEARS = (CapturedTEColumnLinear, CapturedTERowLinear)
