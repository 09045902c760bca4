"""Transformer Engine's layers in float64: the same gradients as Megatron-Core's own, to 1e-10.

TE's Python is the real thing (2.20.2), its kernels are torch's: see `support/te_kernels.py`.
"""

from __future__ import annotations

import pytest
from support.cases import PP2, SP2, TOLERANCE, VPP, Case, assert_equal, run, unsharded
from support.pool import WorkerPool
from support.te_pool import TransformerEnginePool

pytestmark = pytest.mark.te

CASES = [
    Case("exact"),
    Case("exact-bound", "qwen2", batch="many"),
    Case("exact-fused", "qwen2-untied", recompute=True),
    Case("exact", tensor=2),
    Case("exact", "kv1-bias", tensor=2),
    Case("exact-bound", **SP2, batch="many"),
    Case("ridge", "qwen2", **SP2, recompute=True),
    Case("exact", **PP2),
    Case("iterative", "untied", **VPP, batch="five"),
    Case("exact", **SP2, batch="empty"),
    Case("kernel", **SP2),
    Case("subspace", tensor=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_those_of_megatrons_own_layers(
    te_workers: TransformerEnginePool, workers: WorkerPool, case: Case
) -> None:
    expected = unsharded(workers, case.model, case.projection, case.batch, case.dtype, 0, 1)
    assert_equal(
        run(te_workers, case),
        expected,
        TOLERANCE,
        comparison="Transformer Engine's layers against Megatron-Core's, float64",
        case=case,
    )
