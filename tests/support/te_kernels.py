"""Transformer Engine's compiled kernels in plain torch, for its own Python to run on a CPU.

`install` makes TE's Python source (the wheel `transformer-engine`, without its libraries)
importable and gives it this module for ``transformer_engine_torch``. What is the real thing then:
TE's linear layers, autograd functions, quantizers, tensors, recipes and collectives, and Megatron's
wrappers around them. What is not: the kernels, whose FP8 is torch's own conversion with scales of
the largest value; so no figure of precision or speed of a GPU follows from it. A representation of
an FP8 operand that a GEMM would need and that is missing is an error, as on a Hopper GPU.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import os
import sys
import types
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

FLOATS = {7: torch.float8_e4m3fn, 8: torch.float8_e5m2}


DType = enum.IntEnum(
    "DType",
    {
        "kByte": 0,
        "kInt32": 2,
        "kFloat32": 4,
        "kFloat16": 5,
        "kBFloat16": 6,
        "kFloat8E4M3": 7,
        "kFloat8E5M2": 8,
        "kFloat4E2M1": 10,
    },
)
HOPPER = (9, 0)
TORCH = {4: torch.float32, 5: torch.float16, 6: torch.bfloat16}


class FP8FwdTensors(enum.IntEnum):
    GEMM1_INPUT = 0
    GEMM1_WEIGHT = 1
    GEMM1_OUTPUT = 2
    GEMM2_INPUT = 3
    GEMM2_WEIGHT = 4
    GEMM2_OUTPUT = 5
    GEMM3_OUTPUT = 8


class FP8BwdTensors(enum.IntEnum):
    GRAD_OUTPUT1 = 0
    GRAD_INPUT1 = 1
    GRAD_OUTPUT2 = 2
    GRAD_INPUT2 = 3
    GRAD_OUTPUT3 = 4
    GRAD_INPUT3 = 5


# --------------------------------------------------------------------------- quantization


def _cast(values: torch.Tensor, scale: torch.Tensor, kind: int) -> torch.Tensor:
    low = FLOATS[kind]
    top = torch.finfo(low).max
    return (values.float() * scale).clamp(-top, top).to(low).view(torch.uint8)


E8M0 = torch.float8_e8m0fnu  # of MXFP8's scales


def _scale(amax: torch.Tensor, kind: int, power_of_two: bool) -> torch.Tensor:
    scale = torch.finfo(FLOATS[kind]).max / amax
    scale = torch.where(amax > 0, scale, 1.0)
    return torch.exp2(scale.log2().floor()) if power_of_two else scale


def quantize(tensor: Any, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    name = type(quantizer).__name__
    found = {
        "Float8CurrentScalingQuantizer": _current,
        "Float8Quantizer": _delayed,
        "MXFP8Quantizer": _mxfp8,
        "Float8BlockQuantizer": _blockwise,
    }[name](tensor, quantizer)
    if output is None:
        return found
    output.copy_from_storage(found) if hasattr(output, "copy_from_storage") else None
    for field, value in vars(found).items():
        if isinstance(value, torch.Tensor):
            setattr(output, field, value)
    return output


def _current(tensor: torch.Tensor, quantizer: Any) -> Any:
    amax = tensor.abs().amax().float()
    if quantizer.with_amax_reduction:
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
    scale = _scale(amax, quantizer.dtype, quantizer.force_pow_2_scales)
    return _per_tensor(tensor, quantizer, scale)


def _delayed(tensor: torch.Tensor, quantizer: Any) -> Any:
    quantizer.amax.copy_(torch.maximum(quantizer.amax, tensor.abs().amax().float()))
    return _per_tensor(tensor, quantizer, quantizer.scale)


def _per_tensor(tensor: torch.Tensor, quantizer: Any, scale: torch.Tensor) -> Any:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor  # type: ignore
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import (  # type: ignore
        Float8TensorStorage,
    )

    data = _cast(tensor, scale, quantizer.dtype)
    assert quantizer.rowwise_usage, "FP8 of one scale is not quantized along columns only"
    transposed = data.movedim(-1, 0).contiguous() if quantizer.columnwise_usage else None
    common: dict[str, Any] = {
        "data": data,
        "data_transpose": transposed,
        "fp8_scale_inv": (1 / scale).reshape(1),
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(**common, fake_dtype=tensor.dtype)
    return Float8Tensor(shape=tensor.shape, dtype=tensor.dtype, **common)


def _blocks(values: torch.Tensor, length: int) -> torch.Tensor:
    """(n, m) -> (n, m / length, length)."""
    assert values.shape[-1] % length == 0, f"{tuple(values.shape)} in blocks of {length}"
    return values.unflatten(-1, (-1, length))


def _mxfp8(tensor: torch.Tensor, quantizer: Any) -> Any:
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Tensor  # type: ignore
    from transformer_engine.pytorch.tensor.storage.mxfp8_tensor_storage import (  # type: ignore
        MXFP8TensorStorage,
    )

    def along(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = _blocks(values, 32)
        # E8M0: a power of two.
        scale = _scale(blocks.abs().amax(dim=-1).float(), quantizer.dtype, True)
        return _cast(blocks, scale[..., None], quantizer.dtype).flatten(-2), scale

    def padded(scales: torch.Tensor, *, columnwise: bool) -> torch.Tensor:
        rows, width = quantizer.get_scale_shape(tensor.shape, columnwise=columnwise)
        rest = (0, width - scales.shape[1], 0, rows - scales.shape[0])
        # A byte each: an exponent.
        return torch.nn.functional.pad(scales, rest).to(E8M0).view(torch.uint8).contiguous()

    flat = tensor.reshape(-1, tensor.shape[-1])
    data = scales = columns = column_scales = None
    if quantizer.rowwise_usage:
        data, scales = along(flat)
        data, scales = data.view(tensor.shape), padded(1 / scales, columnwise=False)
    if quantizer.columnwise_usage:
        columns, column_scales = along(flat.t().contiguous())
        columns = columns.t().contiguous().view(tensor.shape)
        column_scales = padded((1 / column_scales).t(), columnwise=True)
    common: dict[str, Any] = {
        "rowwise_data": data,
        "rowwise_scale_inv": scales,
        "columnwise_data": columns,
        "columnwise_scale_inv": column_scales,
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
        "with_gemm_swizzled_scales": quantizer.optimize_for_gemm,
    }
    if quantizer.internal:
        return MXFP8TensorStorage(**common, fake_dtype=tensor.dtype)
    return MXFP8Tensor(shape=tensor.shape, dtype=tensor.dtype, **common)


def _blockwise(tensor: torch.Tensor, quantizer: Any) -> Any:
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import (  # type: ignore
        Float8BlockwiseQTensor,
    )
    from transformer_engine.pytorch.tensor.storage import (  # type: ignore
        float8_blockwise_tensor_storage as storage,
    )

    flat = tensor.reshape(-1, tensor.shape[-1])
    square = quantizer.block_scaling_dim == 2

    def along(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = _blocks(values, 128)
        amax = blocks.abs().amax(dim=-1).float()
        if square:
            assert len(values) % 128 == 0
            whole = amax.unflatten(0, (-1, 128)).amax(dim=1)
            scale = _scale(whole, quantizer.dtype, True).repeat_interleave(128, dim=0)
            cast = _cast(blocks, scale[..., None], quantizer.dtype).flatten(-2)
            found = 1 / scale[::128]
            return cast, torch.nn.functional.pad(found, (0, -found.shape[1] % 4))
        scale = _scale(amax, quantizer.dtype, True)
        cast = _cast(blocks, scale[..., None], quantizer.dtype).flatten(-2)
        found = (1 / scale).t().contiguous()
        return cast, torch.nn.functional.pad(found, (0, -found.shape[1] % 4))

    data = scales = columns = column_scales = None
    if quantizer.rowwise_usage:
        data, scales = along(flat)
        data = data.view(tensor.shape)
    if quantizer.columnwise_usage:
        columns, column_scales = along(flat.t().contiguous())
        columns = columns.view(tensor.shape[-1], *tensor.shape[:-1])
    common: dict[str, Any] = {
        "rowwise_data": data,
        "rowwise_scale_inv": scales,
        "columnwise_data": columns,
        "columnwise_scale_inv": column_scales,
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
        "is_2D_scaled": square,
    }
    if quantizer.internal:
        return storage.Float8BlockwiseQTensorStorage(**common, fake_dtype=tensor.dtype)
    return Float8BlockwiseQTensor(shape=tensor.shape, dtype=tensor.dtype, **common)


def dequantize(tensor: Any, dtype: Any) -> torch.Tensor:
    """MXFP8 only: TE reads the others back in torch itself where they are on a CPU."""
    assert not tensor._with_gemm_swizzled_scales, "scales in a GEMM's order can't be read back"
    low = FLOATS[tensor._fp8_dtype]
    if tensor._rowwise_data is not None:
        data, scales = tensor._rowwise_data, tensor._rowwise_scale_inv
        flat = data.reshape(-1, data.shape[-1]).view(low).float()
        blocks = _blocks(flat, 32)
        scales = scales.view(E8M0).float()
        found = blocks * scales[: blocks.shape[0], : blocks.shape[1], None]
        return found.flatten(-2).view(data.shape).to(TORCH[dtype])
    data, scales = tensor._columnwise_data, tensor._columnwise_scale_inv
    flat = data.reshape(-1, data.shape[-1]).view(low).float()
    blocks = flat.unflatten(0, (-1, 32))
    scales = scales.view(E8M0).float()
    found = blocks * scales[: blocks.shape[0], None, : blocks.shape[2]]
    return found.flatten(0, 1).view(data.shape).to(TORCH[dtype])


def create_empty_quantized_tensor(
    quantizer: Any, shape: list[int], dtype: torch.dtype, device: Any, pin_memory: bool
) -> Any:
    own = quantizer.copy()
    if hasattr(own, "with_amax_reduction"):
        own.with_amax_reduction = False
    return quantize(torch.zeros(shape, dtype=dtype), own)


def swap_first_dims(tensor: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    swapped = tensor.transpose(0, 1).contiguous()
    return swapped if out is None else out.copy_(swapped)


def fp8_transpose(data: torch.Tensor, kind: Any, *, out: Any = None) -> torch.Tensor:
    return data.movedim(-1, 0).contiguous()


def bgrad_quantize(tensor: torch.Tensor, quantizer: Any) -> tuple[torch.Tensor, Any]:
    return tensor.reshape(-1, tensor.shape[-1]).sum(dim=0), quantize(tensor, quantizer)


# --------------------------------------------------------------------------- GEMM


def _quantized(tensor: Any) -> bool:
    return type(tensor) not in (torch.Tensor, torch.nn.Parameter)


RECORDED: list[str] = []  # "fp8" or the dtype of each GEMM's operands, in order


def _operand(tensor: Any, *, columnwise: bool) -> torch.Tensor:
    """What a GEMM reads of an operand, (rows, columns); only the copy in its own direction."""
    if not _quantized(tensor):
        return tensor.reshape(-1, tensor.shape[-1])
    name = type(tensor).__name__
    alone = tensor.get_metadata()
    if name.startswith("Float8Tensor"):
        if columnwise:
            assert tensor._transpose is not None, "a GEMM needs the transpose"
            alone = {**alone, "data": None}
        else:
            assert tensor._data is not None, "a GEMM needs the data"
            alone = {**alone, "data_transpose": None}
    else:
        unused = "rowwise" if columnwise else "columnwise"
        used = "columnwise" if columnwise else "rowwise"
        assert alone[f"{used}_data"] is not None, f"a GEMM needs data scaled {used}"
        alone = {**alone, f"{unused}_data": None, f"{unused}_scale_inv": None}
        alone |= {"with_gemm_swizzled_scales": False} if name.startswith("MXFP8") else {}
    kind = next(base for base in type(tensor).__mro__ if base.__name__.endswith("Storage"))
    found = kind(**alone).dequantize(dtype=torch.float32)
    return found.reshape(-1, found.shape[-1])


def generic_gemm(
    a: Any,
    transa: bool,
    b: Any,
    transb: bool,
    out: torch.Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: torch.Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    split_accumulator: bool,
    **options: Any,
) -> tuple[Any, Any, None, None]:
    assert quantizer is None
    assert not gelu
    quantized = [type(x) not in (torch.Tensor, torch.nn.Parameter) for x in (a, b)]
    RECORDED.append("fp8" if any(quantized) else str(b.dtype).removeprefix("torch."))
    left = _operand(b, columnwise=transb)
    right = _operand(a, columnwise=not transa)
    shape = (*b.shape[:-1], -1) if not transb and isinstance(b, torch.Tensor) else None
    if shape is None and not transb:
        shape = (*b.size()[:-1], -1)
    wide = torch.float32 if any(quantized) or left.dtype == torch.bfloat16 else left.dtype
    found = (left.t() if transb else left).to(wide) @ (right.t() if transa else right).to(wide)
    bias_grad = None
    if bias is not None:
        if grad:
            bias_grad = left.sum(dim=0).to(bias.dtype)
        else:
            found = found + bias.to(wide)
    if out is not None:
        out.copy_(out + found if accumulate else found)
        return out, bias_grad, None, None
    # In float64, which TE has no name for, everything stays in it.
    found = found.to(TORCH[int(out_dtype)] if any(quantized) else left.dtype)
    return (found.view(shape) if shape is not None else found), bias_grad, None, None


def te_general_grouped_gemm(
    a: list[torch.Tensor],
    transa: bool,
    b: list[torch.Tensor],
    transb: bool,
    out: list[torch.Tensor],
    *rest: Any,
) -> list[torch.Tensor]:
    """Of plain tensors in the layout of weight gradients; ``rest`` has no bias and no GELU."""
    assert (transa, transb) == (False, True)
    for x, dy, found in zip(a, b, out, strict=True):
        assert x.is_contiguous()
        assert dy.is_contiguous()
        assert found.is_contiguous()
        found.copy_(dy.t().to(found.dtype) @ x.to(found.dtype))
    return []


# --------------------------------------------------------------------------- installing


class _Missing:
    """What is imported by name and never called here."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"the kernel {self._name} has no stand-in")

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __or__

    def __index__(self) -> int:
        return 0


NVTE_Fused_Attn_Backend = enum.IntEnum(
    "NVTE_Fused_Attn_Backend",
    {"NVTE_No_Backend": 0, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2},
)


class _Kernels(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name in globals() and not name.startswith("_"):
            return globals()[name]
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(name)


class _Done:
    def wait(self) -> None: ...


@contextlib.contextmanager
def _one_by_one(*args: Any, **kwargs: Any) -> Iterator[_Done]:
    yield _Done()


class _AsOnGpu(TorchFunctionMode):
    """Tensors say that they lie on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        return func(*args, **(kwargs or {}))


def install(source: Path) -> None:
    """Make TE importable in this process, before Megatron is imported.

    Args:
        source: where the wheel `transformer-engine` was unpacked.
    """
    assert "megatron.core" not in sys.modules
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # no libraries are loaded
    os.environ["NVTE_UNFUSED_FP8_UPDATE"] = "1"  # delayed scaling's own torch code
    sys.path.insert(0, str(source))
    parent = types.ModuleType("transformer_engine")
    parent.__path__ = [str(source / "transformer_engine")]
    parent.__version__ = "2.20.2"  # type: ignore[attr-defined]
    sys.modules["transformer_engine"] = parent
    sys.modules["transformer_engine_torch"] = _Kernels("transformer_engine_torch")
    # What needs packages of its own, for features that no layer here uses.
    for name in ("transformer_engine.pytorch.onnx_extensions", "einops"):
        sys.modules.setdefault(name, _Kernels(name))
    common: Any = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    constants: Any
    importlib.import_module("transformer_engine.pytorch")
    constants = importlib.import_module("transformer_engine.pytorch.constants")
    constants.TE_DType[torch.float64] = constants.DType.kFloat32
    base: Any = importlib.import_module("transformer_engine.pytorch.module.base")
    gemm: Any = importlib.import_module("transformer_engine.pytorch.cpp_extensions.gemm")
    gemm.get_cublas_workspace = lambda device, ub, grouped: (
        [torch.empty(0)] if grouped else torch.empty(0)
    )
    gemm.get_sm_count = lambda: 132
    torch.cuda.get_device_capability = lambda device=None: HOPPER  # type: ignore[assignment]
    mxfp8: Any = importlib.import_module(
        "transformer_engine.pytorch.tensor.storage.mxfp8_tensor_storage"
    )
    mxfp8._FromMXFP8Func.forward = staticmethod(  # which would move the tensor to a GPU
        lambda _, tensor, dtype: dequantize(tensor, constants.TE_DType[dtype])
    )
    quantization: Any = importlib.import_module("transformer_engine.pytorch.quantization")
    for recipe in ("_FP8_SUPPORT", "_MXFP8_SUPPORT", "_FP8_BLOCK_SCALING_SUPPORT"):
        setattr(quantization, recipe, (True, ""))
    distributed: Any = importlib.import_module("transformer_engine.pytorch.distributed")
    distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # Over Gloo the collectives of a group go one by one.
    dist.distributed_c10d._coalescing_manager = _one_by_one  # type: ignore[assignment]
    torch.distributed._coalescing_manager = _one_by_one  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.cuda.is_current_stream_capturing = lambda: False  # type: ignore[assignment]
    module = base.TransformerEngineBaseModule
    build, prepare = module.__init__, module.prepare_forward

    def built(self: Any, *args: Any, **kwargs: Any) -> None:
        with mock.patch("torch.cuda.is_available", return_value=True):
            build(self, *args, **kwargs)

    def prepared(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _AsOnGpu():
            return prepare(self, *args, **kwargs)

    module.__init__, module.prepare_forward = built, prepared


class PackedAttention(torch.nn.Module):
    """In place of TE's attention, whose kernels choose among backends of a GPU."""

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *,
        attn_mask_type: Any,
        packed_seq_params: Any,
        attention_bias: Any = None,
    ) -> torch.Tensor:
        """(T, heads, dim) -> (T, heads * dim), sequences apart, as their boundaries say."""
        assert attention_mask is None or attention_bias is None
        assert attn_mask_type.name == "causal"
        assert packed_seq_params.qkv_format == "thd"
        ends = packed_seq_params.cu_seqlens_q.tolist()
        assert max(b - a for a, b in pairwise(ends)) == packed_seq_params.max_seqlen_q
        assert ends[-1] == len(query)
        found = []
        for start, stop in pairwise(ends):
            q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
            k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            found.append(out.transpose(0, 1).flatten(1))
        return torch.cat(found)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Policies that are built here may have TE's layers on the CPU."""
    from proma_megatron.model import build, te_capture

    def choose(compute: Any, device: str) -> str:
        return "torch" if compute.backend == "torch" else "transformer_engine"

    with (
        mock.patch.object(build, "choose_backend", choose),
        mock.patch.object(te_capture, "_PackedAttention", PackedAttention),
    ):
        yield
