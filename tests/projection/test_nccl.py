"""The same gradients over NCCL, with a rank on each of two GPUs: ``pytest -m gpu``.

Every layout is compared with one process; that with one on the CPU in `test_one_gpu.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.cases import PP2, SP2, VPP, Case, check_layout
from support.pool import WorkerPool

pytestmark = pytest.mark.gpu

CASES = [
    Case("exact", tensor=2),
    Case("exact-bound", "untied", tensor=2, batch="many"),
    Case("exact-linear", "kv1", tensor=2),
    Case("exact-fused", "qwen2", tensor=2),
    Case("exact", **SP2),
    Case("iterative", "qwen2", **SP2, batch="many"),
    Case("ridge-bound", "kv4", **SP2, recompute=True),
    Case("exact-half", "untied", **SP2, block_bytes=4000),
    Case("exact", "qwen2-untied", **SP2, batch="eights"),
    Case("exact", **PP2),
    Case("exact-bound", "untied", **PP2, batch="many"),
    Case("iterative-bound", "qwen2", **PP2, batch="five", recompute=True),
    Case("exact", **VPP, batch="many"),
    Case("ridge", "untied", **VPP, batch="five"),
    Case("exact", data=2),
    Case("exact-bound", "qwen2", data=2, batch="many"),
    Case("exact", **SP2, batch="twice"),
    Case("exact", **PP2, batch="no-loss-token"),
    Case("exact", **SP2, batch="empty"),
    Case("exact-bound", **SP2, dtype="float32", batch="many"),
    Case("exact", "qwen2", **PP2, dtype="float32"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layout_equals_one_process(gpu_workers: WorkerPool, case: Case) -> None:
    check_layout(gpu_workers, case)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        # Tied embeddings over stages, with the one hardware queue that workers are started with.
        ["parallel.tensor=1", "parallel.pipeline=2"],
        ["parallel.tensor=1", "parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    ],
    ids=["tp2", "pp2", "vpp2"],
)
def test_proma_verify_passes_on_two_gpus(
    gpu_workers: WorkerPool, tmp_path: Path, overrides: list[str]
) -> None:
    config = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "proma_megatron.cli", "verify", str(config)),
            *("device=cuda", "model.dtype=float64", "optimizer.clip_grad=0", *overrides),
        ],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NCCL" in done.stdout
