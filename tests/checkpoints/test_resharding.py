"""Checkpoints: complete or refused, and readable by other layouts."""

from pathlib import Path

import pytest
import torch
from support.checkpoints import read, step_after_loading_weights, swap, write
from support.gradients import TINY
from support.pool import WorkerPool
from support.runs import complete

from proma_megatron.config.model import ParallelConfig
from proma_megatron.config.trainer import OptimizerConfig
from proma_megatron.runs.directory import RunDir

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
        path = RunDir(tmp_path).checkpoint(2)
        arguments = {"path": path, "model": TINY, "parallel": parallel, "config": ADAM}
        return workers.run(size, job, **arguments)[0]  # type: ignore[arg-type]

    saved, after = run(write, writer)
    state, loaded, stepped = run(read, reader)
    assert state == {"step": 2}
    same(loaded, saved, atol=0.0)  # type: ignore[arg-type]
    same(stepped, after, atol=1e-9)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reader", "atol"), [({"data": 2}, 0.0), ({"tensor": 2}, 1e-5), ({}, 1e-5)], ids=str
)
def test_adam_that_is_sharded_over_replicas_comes_along(
    workers: WorkerPool, tmp_path: Path, reader: dict[str, object], atol: float
) -> None:
    # In float32, for Megatron's distributed optimizer takes no float64. A count of steps that all
    # parameters share would make the next step wrong by a third of the learning rate.
    arguments = {
        "path": RunDir(tmp_path).checkpoint(2),
        "model": TINY.model_copy(update={"dtype": "float32"}),
        "config": ADAM.model_copy(update={"distributed": True}),
    }
    saved, after = workers.run(2, write, parallel=ParallelConfig(data=2), **arguments)[0]
    parallel = ParallelConfig.model_validate(reader)
    size = parallel.model_size * (parallel.data or 1)
    _, loaded, stepped = workers.run(size, read, parallel=parallel, **arguments)[0]
    same(loaded, saved, atol=0.0)
    same(stepped, after, atol=atol)


def test_an_optimizer_that_was_built_before_takes_the_loaded_weights(
    workers: WorkerPool, tmp_path: Path
) -> None:
    # In bfloat16 it keeps copies in float32, which the next step would bring back.
    path = tmp_path / "step_000000"
    assert workers.run(1, step_after_loading_weights, path=path)[0] < 0.02


def test_adam_of_another_form_is_refused(workers: WorkerPool, tmp_path: Path) -> None:
    path = RunDir(tmp_path).checkpoint(2)
    arguments = {"path": path, "parallel": ParallelConfig(), "config": ADAM}
    workers.run(1, write, model=TINY, **arguments)
    single = TINY.model_copy(update={"dtype": "float32"})
    with pytest.raises(RuntimeError, match=r"step_000002 was saved with model.dtype=float64"):
        workers.run(1, read, model=single, **arguments)


def test_a_checkpoint_without_its_marker_is_not_there(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    whole, broken = run_dir.checkpoint(3), run_dir.checkpoint(12)
    assert run_dir.latest_checkpoint() is None
    broken.mkdir(parents=True)
    complete(whole)
    assert run_dir.latest_checkpoint() == whole
    complete(broken)
    assert run_dir.latest_checkpoint() == broken


def test_a_snapshot_stands_in_and_gives_way(workers: WorkerPool) -> None:
    before, after, inside, left = workers.run(1, swap, model=TINY)[0]
    same(inside, before, atol=0.0)
    same(left, after, atol=0.0)
    name = "model.norm.weight"
    assert not torch.equal(before[name], after[name])
