from collections.abc import Iterator

import pytest
from support.pool import WorkerPool
from support.te_pool import TransformerEnginePool, source

from proma_megatron.distributed.libraries import transformer_engine_problem


@pytest.fixture(scope="session")
def te_gpu(gpu_worker: WorkerPool) -> WorkerPool:
    """One rank on a GPU, with Transformer Engine as it is installed."""
    problem = transformer_engine_problem()
    if problem is not None:
        pytest.skip(problem)
    return gpu_worker


@pytest.fixture(scope="module")
def te_workers() -> Iterator[TransformerEnginePool]:
    """Ranks on the CPU, over Gloo, whose policies have Transformer Engine's layers.

    New ones for each module: some of their jobs leave Gloo's groups behind, whose threads, three a
    group, slow all that come later.
    """
    pool = TransformerEnginePool(source())
    yield pool
    pool.close()
