"""Layouts that don't fit are refused in a sentence; ranks know where they stand."""

from __future__ import annotations

import pytest
import torch
from support.layouts import Place, places, refusal
from support.pool import WorkerPool

from proma_megatron.config.loading import validate_config
from proma_megatron.config.model import ParallelConfig
from proma_megatron.distributed.devices import check_precision, check_world_size, choose_device
from proma_megatron.errors import ConfigError

# --------------------------------------------------------------------------- checks


@pytest.mark.parametrize("world", [4, 8, 12])
def test_replicas_fill_any_multiple_of_the_model(world: int) -> None:
    check_world_size(ParallelConfig(tensor=2, pipeline=2), world)


@pytest.mark.parametrize("world", [1, 2, 6])
def test_a_world_that_the_model_does_not_divide_is_refused_with_the_fix(world: int) -> None:
    with pytest.raises(ConfigError) as caught:
        check_world_size(ParallelConfig(tensor=2, pipeline=2), world)
    assert str(caught.value) == (
        f"{world} processes were started, which parallel.tensor x parallel.pipeline = 4 does not "
        "divide; start a multiple of 4"
    )


def test_a_fixed_number_of_replicas_takes_exactly_its_processes() -> None:
    parallel = ParallelConfig(tensor=2, pipeline=1, data=3)
    check_world_size(parallel, 6)
    for world in (2, 3, 12):
        with pytest.raises(ConfigError) as caught:
            check_world_size(parallel, world)
        assert str(caught.value) == (
            f"{world} processes were started, expected parallel.tensor x pipeline x data = "
            "2 x 1 x 3 = 6; change the layout or the number of processes"
        )


def test_a_layout_checks_the_world_that_it_is_built_in(workers: WorkerPool) -> None:
    for sentence in workers.run(2, refusal, parallel=ParallelConfig(tensor=4)):
        assert "2 processes were started" in sentence
        assert "start a multiple of 4" in sentence


@pytest.mark.parametrize(
    ("requested", "gpus", "workers_here", "chosen"),
    [
        ("auto", 0, 1, "cpu"),
        ("auto", 1, 1, "cuda"),
        ("auto", 1, 2, "cpu"),  # NCCL can't share a GPU
        ("auto", 8, 4, "cuda"),
        ("cpu", 8, 1, "cpu"),
        ("cuda", 2, 2, "cuda"),
    ],
)
def test_a_gpu_is_used_when_every_worker_can_have_one(
    monkeypatch: pytest.MonkeyPatch, requested: str, gpus: int, workers_here: int, chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert choose_device(requested, workers_here) == chosen


def test_too_few_gpus_for_a_run_that_asks_for_them_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"'cuda'.* 1 of the 2 GPUs .*device=cpu"):
        choose_device("cuda", 2)


# --------------------------------------------------------------------------- places

LAYOUTS = [
    ParallelConfig(tensor=2, pipeline=2),
    ParallelConfig(tensor=2, data=2),
    ParallelConfig(pipeline=2, data=2),
    ParallelConfig(pipeline=4),
    ParallelConfig(),  # replicas are counted from the processes
]


@pytest.fixture(scope="module")
def ranks(workers: WorkerPool) -> list[list[Place]]:
    """Places in each layout, by layout and rank, taken one after the other by the same workers."""
    by_rank = workers.run(4, places, layouts=LAYOUTS)
    return [list(found) for found in zip(*by_rank, strict=True)]


def test_coordinates_name_every_rank_once(ranks: list[list[Place]]) -> None:
    for parallel, found in zip(LAYOUTS, ranks, strict=True):
        data = 4 // parallel.model_size
        expected = {
            (t, p, d)
            for t in range(parallel.tensor)
            for p in range(parallel.pipeline)
            for d in range(data)
        }
        assert {(place.tensor, place.pipeline, place.data) for place in found} == expected
        assert [place.is_main for place in found] == [True, False, False, False]


def test_stages_know_the_ends_of_their_own_pipeline(ranks: list[list[Place]]) -> None:
    for parallel, found in zip(LAYOUTS, ranks, strict=True):
        for place in found:
            last = found[place.last_stage]
            assert (last.tensor, last.data) == (place.tensor, place.data)
            assert last.pipeline == parallel.pipeline - 1
            assert place.is_first_stage == (place.pipeline == 0)
            assert place.is_last_stage == (place.pipeline == parallel.pipeline - 1)
            ends = place.is_first_stage or place.is_last_stage
            assert place.at_an_end == (parallel.pipeline > 1 and ends)


def test_every_stage_gets_what_its_own_last_stage_says(ranks: list[list[Place]]) -> None:
    for found in ranks:
        for place in found:
            assert place.from_last_stage == f"rank {place.last_stage}"


def test_gathering_runs_over_the_replicas_of_this_shard_in_their_order(
    ranks: list[list[Place]],
) -> None:
    for found in ranks:
        for place in found:
            peers = [
                rank
                for rank, other in enumerate(found)
                if (other.tensor, other.pipeline) == (place.tensor, place.pipeline)
            ]
            peers.sort(key=lambda rank: found[rank].data)
            assert place.gathered == peers


def test_float64_on_gpus_is_refused_while_gradients_are_clipped() -> None:
    config = validate_config({"name": "r", "model": {"dtype": "float64"}})
    check_precision(config, "cpu")
    with pytest.raises(ConfigError, match="clip_grad=0"):
        check_precision(config, "cuda")
    free = {"name": "r", "model": {"dtype": "float64"}, "optimizer": {"clip_grad": 0}}
    check_precision(validate_config(free), "cuda")
