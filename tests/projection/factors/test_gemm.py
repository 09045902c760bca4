"""Products of half-precision operands are those of the same operands in float64."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.cases import BATCHES, EXACT, MODELS, SP2, Case
from support.engines import Engine, engine_named, in_half_and_whole, stand_ins
from support.gradients import streaming
from support.pool import WorkerPool
from support.slow import all_but

from proma_megatron.distributed import libraries
from proma_megatron.projection.factors import gemm as gemm_module
from proma_megatron.projection.factors.embedding import Lookup
from proma_megatron.projection.factors.gemm import (
    ApexGemm,
    TorchGemm,
    TransformerEngineGemm,
    choose_gemm,
)
from proma_megatron.projection.factors.linear import LinearFactors
from proma_megatron.projection.factors.workspace import Workspace
from proma_megatron.types import PackedSequences

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP32 = torch.bfloat16, torch.float32
ENGINES: list[Engine] = ["transformer_engine", "apex"]
FUSED = {"transformer_engine": "general_gemm", "apex": "wgrad_gemm_accum_fp32"}

# The first microbatch scales tokens by advantages; those of powers of 2 round nothing.
POWERS = (1.0, -0.5, 2.0)
FIRST, *REST = BATCHES["plain"]
BATCH = [
    [dataclasses.replace(s, advantage=a) for s, a in zip(FIRST, POWERS, strict=False)],
    *REST,
]
ONE, SHARDED = Case("exact", "qwen3"), Case("exact", "untied", **SP2)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("case", "tolerance", "block_bytes"),
    all_but(
        [(ONE, 1e-6, None), (ONE, 1e-6, 4000), (SHARDED, 1e-6, None), (SHARDED, 1e-6, 4000)],
        [(ONE, 1e-6, None), (SHARDED, 1e-6, 4000)],
    ),
    ids=str,
)
def test_an_accumulator_of_half_precision_operands(
    workers: WorkerPool, engine: Engine, block_bytes: int | None, case: Case, tolerance: float
) -> None:
    if block_bytes is not None:
        tolerance = 2**-8  # what is streamed scales tokens by coefficients, and rounds them
    ranks = workers.run(
        case.world_size,
        in_half_and_whole,
        engine=engine,
        model=MODELS[case.model].model_copy(update={"dtype": "bfloat16"}),
        parallel=case.parallel,
        projection=EXACT if block_bytes is None else streaming(EXACT, block_bytes),
        batch=BATCH,
    )
    for found in ranks:
        assert found["calls"][FUSED[engine]] > 0
        assert (found["calls"]["general_grouped_gemm"] > 0) == (engine == "transformer_engine")
        errors = {
            name: float((found["half"][name] - whole).norm() / whole.norm())
            for name, whole in found["whole"].items()
        }
        assert not {name: error for name, error in errors.items() if not error <= tolerance}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("lengths", [(3, 2, 4), (4, 0, 2)])
def test_products_of_an_engine_are_exact_but_for_float32(
    engine: Engine, lengths: tuple[int, ...]
) -> None:
    """Of rows of a fused weight, with a tied table's lookup, and a sequence without tokens."""
    generator = torch.Generator().manual_seed(0)
    sequences = PackedSequences.of(lengths, sum(lengths) + 2, CPU)
    x = torch.randn(sum(lengths) + 2, 6, generator=generator).to(BF16)
    dy = torch.randn(sum(lengths) + 2, 10, generator=generator).to(BF16)
    rows = torch.randint(-1, 10, (len(x),), generator=generator)
    looked_up = torch.randn(len(x), 6, generator=generator)
    offsets = list(pairwise(sequences.offsets))
    expected = torch.stack([dy[a:b].double().t() @ x[a:b].double() for a, b in offsets])
    for s, (a, b) in enumerate(offsets):
        for t in range(a, b):
            if rows[t] >= 0:
                expected[s, rows[t]] += looked_up[t]
    with stand_ins():
        factors = LinearFactors(
            x,
            dy,
            sequences,
            Workspace(2**20, CPU),
            dtype=FP32,
            lookup=Lookup(rows, looked_up),
            gemm=engine_named(engine),
        )
        assert factors.x.dtype == factors.dy.dtype == BF16
        kept = factors.materialize(accumulates=False)
        for found in (factors, kept):
            (first, second) = found.products([((0, 3), (7, 10)), ((3, 7),)])
            own = expected[:, [0, 1, 2, 7, 8, 9]].flatten(1)
            torch.testing.assert_close(first.gram, own @ own.T, rtol=1e-5, atol=1e-5)
            own = expected[:, 3:7].flatten(1)
            torch.testing.assert_close(second.gram, own @ own.T, rtol=1e-5, atol=1e-5)


def test_without_a_grouped_gemm_a_gpu_widens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `torch.mm` is documented for CUDA; here it is a stand-in."""
    product = torch.mm

    def documented(
        left: torch.Tensor, right: torch.Tensor, *, out_dtype: torch.dtype, out: torch.Tensor
    ) -> None:
        assert (left.dtype, right.dtype, out_dtype, out.dtype) == (BF16, BF16, FP32, FP32)
        out.copy_(product(left.float(), right.float()))

    monkeypatch.setattr(gemm_module, "_adds_up_in_float32", lambda _: True)
    x = torch.arange(8.0).view(4, 2).to(BF16)
    with stand_ins():
        engine, out = ApexGemm(), torch.empty(2, 2, 2)
    monkeypatch.setattr(torch, "mm", documented)
    engine.sequence_gradients(x, x, PackedSequences.of((1, 3), 4, CPU), out)
    assert out.tolist() == [[[0, 0], [0, 1]], [[56, 68], [68, 83]]]


def test_float32_operands_are_left_to_torch() -> None:
    x, sequences = torch.ones(4, 2), PackedSequences.of((4,), 4, CPU)
    with stand_ins() as calls:
        factors = LinearFactors(
            x, x, sequences, Workspace(2**20, CPU), dtype=FP32, gemm=TransformerEngineGemm()
        )
        factors.materialize(accumulates=False)
    assert isinstance(factors.gemm, TorchGemm)
    assert not calls


@pytest.mark.parametrize(
    ("backend", "device", "operands", "gradients", "apex", "kind"),
    [
        ("transformer_engine", CUDA, BF16, FP32, True, TransformerEngineGemm),
        ("transformer_engine", CUDA, torch.float16, FP32, False, TransformerEngineGemm),
        ("transformer_engine", CUDA, FP32, FP32, True, TorchGemm),
        ("transformer_engine", CUDA, BF16, BF16, True, TorchGemm),
        ("torch", CUDA, BF16, FP32, True, ApexGemm),
        ("torch", CUDA, BF16, FP32, False, TorchGemm),
        ("torch", CUDA, torch.float16, FP32, True, TorchGemm),
        ("torch", CPU, BF16, FP32, True, TorchGemm),
    ],
)
def test_the_engine_is_the_one_that_a_run_has(
    backend: Any,
    device: torch.device,
    operands: torch.dtype,
    gradients: torch.dtype,
    apex: bool,
    kind: type,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(libraries, "has_fused_weight_gradient", lambda: apex)
    with stand_ins():
        assert type(choose_gemm(backend, device, operands, gradients)) is kind
