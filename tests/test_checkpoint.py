"""Checkpoints: complete or refused, and readable by other layouts."""

from pathlib import Path

import pytest
import torch
from support.checkpoints import read, swap, write
from support.gradients import TINY
from support.pool import WorkerPool

from proma_megatron.config import OptimizerConfig, ParallelConfig
from proma_megatron.run_dir import MARKER, RunDir

ADAM = OptimizerConfig(lr=1e-2, clip_grad=0.0, warmup_steps=2, decay="linear")


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        ({"tensor": 2}, {"tensor": 2}),
        ({"tensor": 2}, {}),
        ({}, {"tensor": 2, "pipeline": 2, "sequence": True}),
        ({"pipeline": 2}, {"tensor": 2}),
        ({"data": 2}, {}),
    ],
    ids=str,
)
def test_another_layout_loads_the_weights_and_takes_the_same_next_step(
    workers: WorkerPool,
    tmp_path: Path,
    writer: dict[str, object],
    reader: dict[str, object],
) -> None:
    # The next step shows that Adam's moments and the learning-rate schedule came along.
    def run(job: object, layout: dict[str, object]) -> tuple[object, ...]:
        parallel = ParallelConfig.model_validate(layout)
        size = parallel.model_size * (parallel.data or 1)
        arguments = {"path": tmp_path, "model": TINY, "parallel": parallel, "config": ADAM}
        return workers.run(size, job, **arguments)[0]  # type: ignore[arg-type]

    saved, after = run(write, writer)
    state, loaded, stepped = run(read, reader)
    assert state == {"step": 2}
    same(loaded, saved, atol=0.0)  # type: ignore[arg-type]
    same(stepped, after, atol=1e-9)  # type: ignore[arg-type]


def test_a_checkpoint_without_its_marker_is_not_there(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    complete, broken = run_dir.checkpoint(3), run_dir.checkpoint(12)
    assert run_dir.latest_checkpoint() is None
    for path in (complete, broken):
        path.mkdir(parents=True)
    (complete / MARKER).write_text("{}")
    assert run_dir.latest_checkpoint() == complete
    (broken / MARKER).write_text("{}")
    assert run_dir.latest_checkpoint() == broken


def test_an_incomplete_checkpoint_is_refused(workers: WorkerPool, tmp_path: Path) -> None:
    arguments = {"model": TINY, "parallel": ParallelConfig(), "config": ADAM}
    with pytest.raises(RuntimeError, match="is no complete checkpoint"):
        workers.run(1, read, path=tmp_path, **arguments)


def test_a_snapshot_stands_in_and_gives_way(workers: WorkerPool) -> None:
    before, after, inside, left = workers.run(1, swap, model=TINY)[0]
    same(inside, before, atol=0.0)
    same(left, after, atol=0.0)
    name = "model.norm.weight"
    assert not torch.equal(before[name], after[name])
