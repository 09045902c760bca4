from collections.abc import Iterator

import pytest
from support.gradients import nothing
from support.pool import MAX_WORKERS, WorkerPool


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    pool = WorkerPool()
    pool.run(MAX_WORKERS, nothing)  # all at once: importing Megatron takes seconds a process
    yield pool
    pool.close()
