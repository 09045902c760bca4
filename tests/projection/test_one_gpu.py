"""One process on a GPU computes what one on the CPU does: ``pytest -m gpu``.

On a GPU the projection goes other ways, see `projection/waiting.py`: nothing of it may make the
host wait, and eigenvalues give way to a factorization with pivots.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import BATCHES, MODELS, OTHER_RULES, PROJECTIONS, Case, assert_equal, run
from support.gpu_jobs import backward_without_waiting, products, solved
from support.pool import WorkerPool

from proma_megatron.distributed import libraries

pytestmark = pytest.mark.gpu

CASES = [
    Case(),
    Case("exact-bound", "qwen2-untied"),
    Case("exact-bound", "untied", batch="many"),
    Case("exact", "qwen2", block_bytes=4000),
    Case("exact", batch="twice"),
    Case("iterative-bound", "kv1", recompute=True),
    Case("ridge-bound", batch="many"),
    Case("kernel"),
    Case("norm"),
    Case("subspace"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_gpu_equals_one_cpu(gpu_worker: WorkerPool, workers: WorkerPool, case: Case) -> None:
    assert_equal(
        run(gpu_worker, case),
        run(workers, case),
        1e-9,
        comparison="one GPU against one CPU, float64",
        case=case,
    )


@pytest.mark.parametrize("k", [1, 2, 7, 16])
@pytest.mark.parametrize("rule", ["exact", "ridge", "iterative"])
@pytest.mark.parametrize("bound", [None, 0.5])
def test_what_is_solved_without_waiting_is_what_the_cpu_solves(
    gpu_worker: WorkerPool, workers: WorkerPool, rule: Any, bound: float | None, k: int
) -> None:
    ((found, finite),), ((expected, own),) = (
        pool.run(1, solved, rule=rule, bound=bound, k=k) for pool in (gpu_worker, workers)
    )
    assert finite.tolist() == own.tolist() == [True] * 7 + [False]
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-300)
    assert float(error.max()) < 1e-10


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("model", ["qwen3", "qwen2-untied"])
@pytest.mark.parametrize(
    "projection", ["exact", "exact-bound", "iterative", "ridge-bound", "kernel", "norm"]
)
def test_a_projected_backward_pass_does_not_wait_for_the_gpu(
    gpu_worker: WorkerPool, projection: str, model: str, dtype: str
) -> None:
    (looked,) = gpu_worker.run(
        1,
        backward_without_waiting,
        model=MODELS[model].model_copy(update={"dtype": dtype, "backend": "torch"}),
        projection=(PROJECTIONS | OTHER_RULES)[projection],
        batch=BATCHES["many"],
    )
    assert looked == list(range(len(BATCHES["many"])))


def test_a_wait_would_be_noticed(gpu_worker: WorkerPool) -> None:
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        gpu_worker.run(
            1,
            backward_without_waiting,
            model=MODELS["qwen3"],
            projection=PROJECTIONS["exact"],
            batch=BATCHES["two"],
            waits=True,
        )


@pytest.mark.parametrize("lengths", [(5, 3, 17, 1), (64, 0, 31), (129,)], ids=str)
def test_apexs_products_are_exact_but_for_float32(
    gpu_worker: WorkerPool, lengths: tuple[int, ...]
) -> None:
    if not libraries.has_fused_weight_gradient():
        pytest.skip("NVIDIA Apex with fused_weight_gradient_mlp_cuda is not installed")
    (errors,) = gpu_worker.run(1, products, engine="apex", lengths=lengths, rows=(32, 96))
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


def test_nothing_of_this_ran_on_a_cpu(gpu_worker: WorkerPool) -> None:
    assert gpu_worker.run(1, device_of) == ["cuda"]


def device_of(device: torch.device) -> str:
    return torch.ones(1, device=device).device.type
