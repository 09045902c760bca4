"""Which entries of which Hugging Face tensor a rank holds, in every kind of layout."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from support.gradients import TINY, VOCAB, random_weights
from support.pool import WorkerPool
from support.shards import (
    LocalShard,
    bytes_gathered,
    filled_then_gathered,
    initial_weights,
    local_shards,
    refusals,
)
from support.slow import all_but

from proma_megatron.config.model import ParallelConfig
from proma_megatron.weights.mapping import tensor_shapes

LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp2": ParallelConfig(tensor=2),
    "tp4": ParallelConfig(tensor=4),
    "tp4-sp": ParallelConfig(tensor=4, sequence=True),
    "pp2": ParallelConfig(pipeline=2),
    "vpp2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "tp2-pp2": ParallelConfig(tensor=2, pipeline=2),
    "tp2-vpp2": ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=2),
    "dp2-tp2": ParallelConfig(tensor=2, data=2),
}
MODELS = {
    "qwen3-tied": TINY,
    "qwen3-untied": TINY.model_copy(update={"tie_embeddings": False}),
    "qwen2-untied": TINY.model_copy(
        update={"qk_norm": False, "qkv_bias": True, "tie_embeddings": False}
    ),
    "qwen2-kv1": TINY.model_copy(update={"qk_norm": False, "qkv_bias": True, "kv_heads": 1}),
    "qwen3-kv4": TINY.model_copy(update={"kv_heads": 4}),
}
# Every layout with the tied model; where heads are cut, also with the others.
CASES = [("qwen3-tied", name) for name in LAYOUTS] + list(
    itertools.product(list(MODELS)[1:], ["tp4", "tp2-pp2"])
)
# A cut is seen with one model of its kind.
REPEATED = [
    *(("qwen3-tied", "tp4"), ("qwen3-tied", "tp2-pp2"), ("qwen3-untied", "tp4")),
    *(("qwen2-untied", "tp2-pp2"), ("qwen2-kv1", "tp2-pp2"), ("qwen3-kv4", "tp2-pp2")),
]
every_case = pytest.mark.parametrize(
    ("model_name", "layout_name"),
    all_but(CASES, REPEATED),
)


def world_size(parallel: ParallelConfig) -> int:
    return parallel.model_size * (parallel.data or 1)


@functools.cache
def shards_by_rank(
    workers: WorkerPool, model_name: str, layout_name: str
) -> list[list[LocalShard]]:
    model, parallel = MODELS[model_name], LAYOUTS[layout_name]
    return workers.run(world_size(parallel), local_shards, model=model, parallel=parallel)


@every_case
def test_gathering_gives_back_what_was_filled_in(
    workers: WorkerPool, model_name: str, layout_name: str
) -> None:
    model, parallel = MODELS[model_name], LAYOUTS[layout_name]
    results = workers.run(
        world_size(parallel), filled_then_gathered, model=model, parallel=parallel, seed=5
    )
    full, _ = results[0]
    expected = random_weights(model, 5)
    assert full.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(full[name], expected[name])] == []
    assert [left for _, left in results if left] == []
    assert all(other == {} for other, _ in results[1:])


@every_case
def test_runs_cover_the_local_axis_once(
    workers: WorkerPool, model_name: str, layout_name: str
) -> None:
    """Up to the rows that pad the vocabulary to a multiple of TP."""
    parallel = LAYOUTS[layout_name]
    for shard in itertools.chain(*shards_by_rank(workers, model_name, layout_name)):
        hits = torch.zeros(shard.shape[shard.axis], dtype=torch.int64)
        for run in shard.runs:
            hits[run.local : run.local + run.length] += 1
        padding = 0
        if shard.name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            stop = (shard.tensor_rank + 1) * len(hits)
            padding = max(0, stop - VOCAB)
            assert padding < parallel.tensor
        assert (hits[: len(hits) - padding] == 1).all(), shard
        assert (hits[len(hits) - padding :] == 0).all(), shard


@every_case
def test_ranks_cover_every_tensor_once(
    workers: WorkerPool, model_name: str, layout_name: str
) -> None:
    """Each tensor-parallel rank holds the whole of what is not cut; replicas hold the same."""
    model, parallel = MODELS[model_name], LAYOUTS[layout_name]
    shapes = tensor_shapes(model, VOCAB)
    hits: dict[tuple[str, int], torch.Tensor] = {}
    for shard in itertools.chain(*shards_by_rank(workers, model_name, layout_name)):
        for run in shard.runs:
            shape = shapes[run.tensor]
            other = [size for axis, size in enumerate(shape) if axis != shard.axis]
            assert other == [n for axis, n in enumerate(shard.shape) if axis != shard.axis]
            # Whole tensors are counted on each rank by itself.
            owner = -1 if shard.reduction == "disjoint" else shard.tensor_rank
            count = hits.setdefault(
                (run.tensor, owner), torch.zeros(shape[shard.axis], dtype=torch.int64)
            )
            assert 0 <= run.start <= run.start + run.length <= len(count)
            count[run.start : run.start + run.length] += 1
    assert {tensor for tensor, _ in hits} == shapes.keys()
    for (tensor, _), count in hits.items():
        copies = parallel.data or 1
        if tensor == "model.embed_tokens.weight" and model.tie_embeddings:
            copies *= min(2, parallel.pipeline)  # the first and the last stage have a table
        assert (count == copies).all(), tensor


@every_case
def test_every_rank_knows_every_tensor_of_its_parameters(
    workers: WorkerPool, model_name: str, layout_name: str
) -> None:
    """Ranks that disagreed about the units would disagree about what is reduced."""
    by_parameter: dict[str, set[tuple[str, ...]]] = {}
    for shard in itertools.chain(*shards_by_rank(workers, model_name, layout_name)):
        tensors = tuple(dict.fromkeys(run.tensor for run in shard.runs))
        by_parameter.setdefault(shard.name, set()).add(tensors)
    assert [name for name, found in by_parameter.items() if len(found) != 1] == []


@pytest.mark.parametrize("name", ["tp4", "vpp2", "tp2-pp2"])
def test_initial_weights_are_alike_in_every_layout(workers: WorkerPool, name: str) -> None:
    parallel = LAYOUTS[name]

    def build(parallel: ParallelConfig, seed: int) -> dict[str, torch.Tensor]:
        return workers.run(
            world_size(parallel), initial_weights, model=TINY, parallel=parallel, seed=seed
        )[0]

    sharded, single, other = build(parallel, 3), build(ParallelConfig(), 3), build(parallel, 4)
    assert all(torch.equal(sharded[name], single[name]) for name in single)
    assert not torch.equal(sharded["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_gathering_sends_what_it_gathers_and_no_more(workers: WorkerPool) -> None:
    """Gradients are views into one buffer, which must not come along."""
    shapes = tensor_shapes(TINY, VOCAB)
    last = [name for name in shapes if name.startswith(("model.layers.2", "model.layers.3"))]
    # The tied table is on both stages.
    sent_names = [*last, "model.norm.weight", "model.embed_tokens.weight"]
    needed = 8 * sum(math.prod(shapes[name]) for name in sent_names)
    (_, nothing), (sent, everything) = workers.run(2, bytes_gathered, model=TINY)
    assert nothing < 20_000
    assert sent == needed
    assert everything < needed + 20_000


def test_a_parameter_that_the_table_or_the_model_does_not_have_is_named(
    workers: WorkerPool,
) -> None:
    """By its layer in the model: the last chunk counts its own from 0."""
    model = TINY.model_copy(update={"qkv_bias": True})
    parallel = LAYOUTS["vpp2"]
    found = workers.run(world_size(parallel), refusals, model=model, parallel=parallel, denied=TINY)
    unknown, denied = found[-1]
    assert unknown.startswith("parameter decoder.layers.3.mlp.extra has no")
    assert "decoder.layers.3.self_attention.linear_qkv.bias" in denied
    assert "model.layers.3.self_attn.q_proj.bias" in denied
