from collections.abc import Iterator

import pytest
import torch
from support.cases import LARGEST
from support.gradients import nothing
from support.pool import MAX_WORKERS, WorkerPool


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """Ranks on the CPU, over Gloo."""
    pool = WorkerPool()
    pool.run(MAX_WORKERS, nothing)  # all at once: importing Megatron takes seconds a process
    yield pool
    pool.close()


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
