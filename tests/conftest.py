from collections.abc import Iterator

import pytest
from support import quick  # noqa: F401 - before anything that loads Megatron
from support.forked import end_all
from support.pool import WorkerPool
from support.pooled import PooledStarter

from proma_megatron.processes.elastic import starting_ranks


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """Ranks on the CPU, over Gloo."""
    pool = WorkerPool()
    yield pool
    pool.close()


@pytest.fixture
def in_pool(workers: WorkerPool) -> Iterator[None]:
    """Commands run in this process, and their ranks in the pool: starting others takes seconds."""
    with starting_ranks(PooledStarter(workers)):
        yield


@pytest.fixture(scope="session")
def gpu_worker() -> Iterator[WorkerPool]:
    """One rank on a GPU."""
    import torch

    if not torch.cuda.device_count():
        pytest.skip("needs a GPU, and here is none")
    pool = WorkerPool("cuda")
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def gpu_workers() -> Iterator[WorkerPool]:
    """Two ranks on GPUs of their own, over NCCL."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus < 2:
        pytest.skip(f"needs two GPUs, for NCCL gives each rank one of its own; here are {gpus}")
    pool = WorkerPool("cuda")
    yield pool
    pool.close()


@pytest.hookimpl(trylast=True)  # after fixtures have closed their pools
def pytest_sessionfinish() -> None:
    end_all()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures behind the exactness tests, which otherwise only say that they passed."""
    from support.cases import LARGEST

    if not LARGEST:
        return
    terminalreporter.section("largest relative error of a gradient tensor")
    for comparison, (error, where) in sorted(LARGEST.items()):
        terminalreporter.write_line(f"{error:.1e}  {comparison}  ({where})")
