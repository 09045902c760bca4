"""States of random number generators: a resumed run draws what it would have drawn."""

from pathlib import Path

from support.checkpoints import draws
from support.pool import WorkerPool

from proma_megatron.runs.directory import RunDir


def test_every_generator_goes_on_on_every_rank(workers: WorkerPool, tmp_path: Path) -> None:
    found = workers.run(2, draws, path=RunDir(tmp_path).checkpoint(2))
    for first, again in found:
        assert again == first
    assert found[0] != found[1]
