"""Stand-ins for GPU libraries' GEMMs, and what an accumulator gives with them.

They demand what the real ones do, of layout, contiguity and dtype, and compute with torch.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Literal
from unittest import mock

import torch

from proma_megatron.config.model import ModelConfig, ParallelConfig
from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.learner.gradients import denominator, replica_share
from proma_megatron.learner.schedule import forward_backward
from proma_megatron.losses.options import UNIT
from proma_megatron.model.policy import Policy
from proma_megatron.projection.accumulator import Accumulator
from proma_megatron.projection.factors.gemm import ApexGemm, Gemm, TorchGemm, TransformerEngineGemm
from proma_megatron.types import TrainingSequence
from support.gradients import _policy

Engine = Literal["transformer_engine", "apex"]


def _check(x: torch.Tensor, dy: torch.Tensor, out: torch.Tensor) -> None:
    for found in (x, dy, out):
        assert found.is_contiguous()
        assert found.dim() == 2
        assert found.numel()
    assert x.dtype == dy.dtype == torch.bfloat16
    assert out.dtype == torch.float32
    assert (len(x), dy.shape[1], x.shape[1]) == (len(dy), *out.shape)


@contextlib.contextmanager
def stand_ins() -> Iterator[Counter[str]]:
    """Both libraries, as far as they are used; how often each function was called."""
    calls: Counter[str] = Counter()

    def general_gemm(
        x: torch.Tensor,  # TE's A and B; both are given by position
        dy: torch.Tensor,
        /,
        out_dtype: torch.dtype | None = None,
        *,
        accumulate: bool = False,
        layout: str = "TN",
        out: torch.Tensor,
        grad: bool = False,
    ) -> tuple[torch.Tensor, None, None, None]:
        calls["general_gemm"] += 1
        assert layout == "NT"
        assert accumulate
        assert grad
        assert out_dtype == out.dtype
        _check(x, dy, out)
        out += dy.float().t() @ x.float()
        return out, None, None, None

    def general_grouped_gemm(
        xs: list[torch.Tensor],
        dys: list[torch.Tensor],
        outs: list[torch.Tensor],
        /,
        quantization_params: list[None],
        out_dtype: torch.dtype,
        layout: str = "TN",
        m_splits: list[int] | None = None,
        grad: bool = False,
        accumulate: bool = False,
    ) -> tuple[list[torch.Tensor], None, None]:
        calls["general_grouped_gemm"] += 1
        assert layout == "NT"
        assert grad
        assert not accumulate
        assert m_splits == [len(x) for x in xs]
        for x, dy, found, quantizer in zip(xs, dys, outs, quantization_params, strict=True):
            assert quantizer is None
            assert out_dtype == found.dtype
            _check(x, dy, found)
            found.copy_(dy.float().t() @ x.float())
        return outs, None, None

    def wgrad_gemm_accum_fp32(x: torch.Tensor, dy: torch.Tensor, out: torch.Tensor) -> None:
        calls["wgrad_gemm_accum_fp32"] += 1
        _check(x, dy, out)
        out += dy.float().t() @ x.float()

    extensions: Any = ModuleType("transformer_engine.pytorch.cpp_extensions")
    extensions.general_gemm = general_gemm
    extensions.general_grouped_gemm = general_grouped_gemm
    apex: Any = ModuleType("fused_weight_gradient_mlp_cuda")
    apex.wgrad_gemm_accum_fp32 = wgrad_gemm_accum_fp32
    modules = {
        "transformer_engine": ModuleType("transformer_engine"),
        "transformer_engine.pytorch": ModuleType("transformer_engine.pytorch"),
        extensions.__name__: extensions,
        apex.__name__: apex,
    }
    with mock.patch.dict(sys.modules, modules):
        yield calls


def engine_named(name: Engine) -> Gemm:
    """To be made where the stand-ins are."""
    return TransformerEngineGemm() if name == "transformer_engine" else ApexGemm()


def in_half_and_whole(
    device: torch.device,
    engine: Engine,
    model: ModelConfig,
    parallel: ParallelConfig,
    projection: ProjectionConfig,
    batch: list[list[TrainingSequence]],
) -> dict[str, Any]:
    """``main_grad`` of this rank, by name, of one bfloat16 policy accumulated twice.

    "half": float32, by an engine that keeps operands; "whole": float64, of the same operands
    widened, whose products are exact. "calls": of the engine.
    """
    with _policy(device, model, parallel) as policy, stand_ins() as calls:
        half = _accumulated(policy, projection, batch, engine_named(engine))
        for shard in policy.shards:
            wide = torch.zeros_like(shard.parameter, dtype=torch.float64, requires_grad=False)
            shard.parameter.main_grad = wide  # type: ignore[attr-defined]
        whole = _accumulated(policy, projection, batch, TorchGemm())
        return {"half": half, "whole": whole, "calls": calls}


def _accumulated(
    policy: Policy,
    projection: ProjectionConfig,
    batch: list[list[TrainingSequence]],
    gemm: Gemm,
) -> dict[str, torch.Tensor]:
    accumulator = Accumulator(
        policy.modules,
        policy.shards,
        projection,
        policy.topology,
        tied=policy.model.tie_embeddings,
        gemm=gemm,
    )
    microbatches = replica_share(batch, 0, 1, policy, denominator(batch))
    forward_backward(policy, microbatches, UNIT, accumulator=accumulator)
    return {
        shard.name: shard.parameter.main_grad.clone()  # type: ignore[attr-defined]
        for shard in policy.shards
    }
