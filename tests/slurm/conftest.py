from collections.abc import Iterator

import pytest
from support.slurm import SlurmCluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """Slurm with two nodes; commands find it through this process's environment."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    with SlurmCluster() as slurm, pytest.MonkeyPatch.context() as patch:
        for name, value in slurm.environment.items():
            patch.setenv(name, value)
        yield slurm
