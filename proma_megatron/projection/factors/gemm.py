"""The two matrix products of a linear weight's gradients, by the library that a run has.

`TorchGemm` widens both operands to the dtype of ``main_grad``; that is exact, and on a GPU far from
the rate of bf16. The others keep half-precision operands, whose products are added up in float32:
exact products, so nothing is lost but what the operands' own rounding has taken.
"""

from __future__ import annotations

from importlib import import_module
from itertools import pairwise
from typing import Literal, Protocol

import torch

from proma_megatron.distributed import libraries
from proma_megatron.types import PackedSequences

HALVES = (torch.bfloat16, torch.float16)

# One batched GEMM costs less than a GEMM a sequence where those have fewer multiplications than
# this, and padding makes them no more than so many times as many.
SMALL_GEMM = 2**23
MOST_PADDED = 1.5


class Gemm(Protocol):
    """Products of X (T, in) and dY (T, out), or of columns of it."""

    def takes(self, operands: torch.dtype, gradients: torch.dtype) -> bool:
        """Tell whether X and dY may have this dtype where ``main_grad`` has that one."""
        ...

    def operand(self, values: torch.Tensor, gradients: torch.dtype) -> torch.Tensor:
        """Return X or dY as the products want them; done once for all of them."""
        ...

    def sequence_gradients(
        self, dy: torch.Tensor, x: torch.Tensor, sequences: PackedSequences, out: torch.Tensor
    ) -> None:
        """Set ``out[s] = dY_s^T X_s``; out (k, rows, in), dy (T, rows)."""
        ...

    def accumulate(self, dy: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
        """Add dY^T X to out (rows, in), adjacent rows of ``main_grad``; dy (T, rows)."""
        ...


def choose_gemm(
    backend: Literal["torch", "transformer_engine"],
    device: torch.device,
    operands: torch.dtype,
    gradients: torch.dtype,
) -> Gemm:
    """Return the products of a run.

    Args:
        backend: whose layers the policy is built of.
        operands: the dtype that the model computes in.
        gradients: of ``main_grad``.
    """
    if operands not in HALVES or gradients != torch.float32:
        return TorchGemm()
    if backend == "transformer_engine":
        return TransformerEngineGemm()
    on_gpu = device.type == "cuda" and operands == torch.bfloat16
    return ApexGemm() if on_gpu and libraries.has_fused_weight_gradient() else TorchGemm()


class TorchGemm:
    """Plain torch, in the dtype of ``main_grad``."""

    def takes(self, operands: torch.dtype, gradients: torch.dtype) -> bool:
        return True

    def operand(self, values: torch.Tensor, gradients: torch.dtype) -> torch.Tensor:
        return values.to(gradients)

    def sequence_gradients(
        self, dy: torch.Tensor, x: torch.Tensor, sequences: PackedSequences, out: torch.Tensor
    ) -> None:
        batched = _batched(dy, x, sequences)
        if batched is not None:
            torch.bmm(batched[0].mT, batched[1], out=out)
            return
        for s, (low, high) in enumerate(pairwise(sequences.offsets)):
            torch.mm(dy[low:high].t(), x[low:high], out=out[s])

    def accumulate(self, dy: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
        out.addmm_(dy.t(), x)


def _batched(
    dy: torch.Tensor, x: torch.Tensor, sequences: PackedSequences
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return dY (k, L, rows) and X (k, L, in), where one batched GEMM beats one a sequence.

    Short sequences are padded with zeros to the longest, unless that is much longer.
    """
    k, lengths = sequences.count, sequences.lengths
    longest, tokens = max(lengths), sum(lengths)
    if longest * x.shape[1] * dy.shape[1] > SMALL_GEMM:
        return None
    if longest * k == tokens:
        shape = (k, longest, -1)
        return dy[:tokens].unflatten(0, shape[:2]), x[:tokens].view(shape)
    if longest * k > MOST_PADDED * tokens:
        return None
    return sequences.padded(dy), sequences.padded(x)


class _Mixed:
    """Half-precision operands as they are, for sums in float32."""

    dtypes: tuple[torch.dtype, ...] = HALVES

    def takes(self, operands: torch.dtype, gradients: torch.dtype) -> bool:
        return operands in self.dtypes and gradients == torch.float32

    def operand(self, values: torch.Tensor, gradients: torch.dtype) -> torch.Tensor:
        return values.contiguous()


class TransformerEngineGemm(_Mixed):
    """Transformer Engine's GEMMs, called as its own linear layers do for weight gradients.

    They take tensors by address and shape: what is not contiguous would be read wrongly. A grouped
    one spreads its GEMMs, here one a sequence, over several streams and waits for none on the host.
    As read in 2.20.2: `cpp_extensions/gemm.py`, `module/linear.py` and `module/grouped_linear.py`.
    """

    def __init__(self) -> None:
        extensions = import_module("transformer_engine.pytorch.cpp_extensions")
        self._gemm = extensions.general_gemm
        self._grouped = extensions.general_grouped_gemm

    def sequence_gradients(
        self, dy: torch.Tensor, x: torch.Tensor, sequences: PackedSequences, out: torch.Tensor
    ) -> None:
        dy, x = dy.contiguous(), x.contiguous()
        present = []
        for s, (low, high) in enumerate(pairwise(sequences.offsets)):
            if low < high:
                present.append((x[low:high], dy[low:high], out[s]))
            else:
                out[s].zero_()
        if not present or not out[0].numel():
            return
        xs, dys, outs = (list(part) for part in zip(*present, strict=True))
        self._grouped(
            xs,
            dys,
            outs,
            quantization_params=[None] * len(outs),
            out_dtype=out.dtype,
            layout="NT",
            m_splits=[len(found) for found in xs],
            grad=True,
            accumulate=False,
        )

    def accumulate(self, dy: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
        if out.numel():
            self._gemm(
                x.contiguous(),
                dy.contiguous(),
                out_dtype=out.dtype,
                layout="NT",
                out=out,
                accumulate=True,
                grad=True,
            )


class ApexGemm(_Mixed):
    """Apex's GEMM that adds to float32 gradients, called as Megatron's linear layers do."""

    dtypes = (torch.bfloat16,)

    def __init__(self) -> None:
        self._add = import_module("fused_weight_gradient_mlp_cuda").wgrad_gemm_accum_fp32

    def sequence_gradients(
        self, dy: torch.Tensor, x: torch.Tensor, sequences: PackedSequences, out: torch.Tensor
    ) -> None:
        for s, (low, high) in enumerate(pairwise(sequences.offsets)):
            _product(dy[low:high].t(), x[low:high], out[s])

    def accumulate(self, dy: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
        if out.numel():
            self._add(x.contiguous(), dy.contiguous(), out)


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """Set ``out = left right`` in float32, of half-precision factors."""
    if _adds_up_in_float32(left.device):
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def _adds_up_in_float32(device: torch.device) -> bool:
    """Tell whether `torch.mm` has a float32 ``out_dtype`` for these, by its documentation."""
    return device.type == "cuda"
