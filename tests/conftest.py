from collections.abc import Iterator

import pytest
import torch
from support.cases import LARGEST
from support.gradients import nothing
from support.pool import MAX_WORKERS, WorkerPool
from support.pooled import PooledStarts


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """Ranks on the CPU, over Gloo."""
    pool = WorkerPool()
    pool.run(MAX_WORKERS, nothing)  # all at once: importing Megatron takes seconds a process
    yield pool
    pool.close()


@pytest.fixture
def in_pool(workers: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in this process, and their ranks in the pool: starting others takes seconds."""
    starts = PooledStarts(workers)
    monkeypatch.setattr("proma_megatron.launcher.start_workers", starts.start_workers)
    for module in ("export.job", "evaluation.job", "exactness.grads"):
        monkeypatch.setattr(f"proma_megatron.{module}.run_job", starts.run_job)


@pytest.fixture(scope="session")
def gpu_workers() -> Iterator[WorkerPool]:
    """Two ranks on GPUs of their own, over NCCL."""
    gpus = torch.cuda.device_count()
    if gpus < 2:
        pytest.skip(f"needs two GPUs, for NCCL gives each rank one of its own; here are {gpus}")
    pool = WorkerPool("cuda")
    pool.run(2, nothing)
    yield pool
    pool.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures behind the exactness tests, which otherwise only say that they passed."""
    if not LARGEST:
        return
    terminalreporter.section("largest relative error of a gradient tensor")
    for comparison, (error, where) in sorted(LARGEST.items()):
        terminalreporter.write_line(f"{error:.1e}  {comparison}  ({where})")
