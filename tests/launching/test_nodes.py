"""How ranks of a layout fall on nodes."""

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.launch import site

from proma_megatron.config.model import ParallelConfig
from proma_megatron.errors import ConfigError
from proma_megatron.launching.nodes import Nodes, nodes_for, note_on_tensor_parallel

SIZES = st.integers(1, 12)


@st.composite
def layouts(draw: st.DrawFn) -> ParallelConfig:
    data = draw(st.none() | SIZES)
    return ParallelConfig(tensor=draw(SIZES), pipeline=draw(SIZES), data=data)


@st.composite
def nodes_of_sites(draw: st.DrawFn) -> dict[str, Any]:
    gpus = draw(st.integers(0, 8))
    fewest, most = (1, gpus) if gpus else (1, 16)
    ranks = draw(st.integers(fewest, most) if not gpus else st.none() | st.integers(fewest, most))
    return {"gpus_per_node": gpus, "ranks_per_node": ranks}


@given(layouts(), nodes_of_sites())
def test_nodes_times_ranks_are_the_layout_or_it_is_refused(
    parallel: ParallelConfig, keys: dict[str, Any]
) -> None:
    cluster = site(**keys)
    world = parallel.world_size
    try:
        nodes = nodes_for(parallel, cluster)
    except ConfigError:
        assert world > cluster.ranks
        assert world % cluster.ranks
        return
    assert nodes.count * nodes.ranks == world
    assert nodes.ranks <= cluster.ranks
    assert nodes.count == 1 or nodes.ranks == cluster.ranks  # no node is used in part
    assert nodes.gpus == (nodes.ranks if cluster.gpus_per_node else 0)


@given(layouts(), nodes_of_sites())
def test_a_warning_tells_of_tensor_parallel_groups_that_span_nodes(
    parallel: ParallelConfig, keys: dict[str, Any]
) -> None:
    cluster = site(**keys)
    assume(parallel.world_size % cluster.ranks == 0)
    nodes = nodes_for(parallel, cluster)
    note = note_on_tensor_parallel(parallel, nodes)
    assert (note is not None) == (parallel.tensor > cluster.ranks)


def test_the_warning_says_over_how_many() -> None:
    parallel = ParallelConfig(tensor=6)
    assert note_on_tensor_parallel(parallel, nodes_for(parallel, site())) == (
        "parallel.tensor=6 spans 3 nodes, whose network every layer waits for; at most 2 stays "
        "within one"
    )


@pytest.mark.parametrize(
    ("keys", "key"),
    [({}, "gpus_per_node"), ({"gpus_per_node": 0, "ranks_per_node": 2}, "ranks_per_node")],
)
def test_gpus_that_do_not_match_are_named_with_what_to_change(
    keys: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        nodes_for(ParallelConfig(tensor=1, pipeline=3, data=None), site(**keys))
    assert str(caught.value) == (
        "parallel.tensor x pipeline x data = 1 x 3 x 1 = 3 ranks, expected at most 2 or a multiple "
        f"of it, for nodes have 2 each; change the layout (parallel.data, for example) or {key} of "
        "the cluster file"
    )


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        (Nodes(1, 1, 1), "1 node x 1 GPU"),
        (Nodes(4, 8, 8), "4 nodes x 8 GPUs"),
        (Nodes(1, 1, 0), "1 node x 1 rank on CPUs"),
        (Nodes(2, 4, 0), "2 nodes x 4 ranks on CPUs"),
    ],
)
def test_what_is_asked_for_is_said_in_words(nodes: Nodes, words: str) -> None:
    assert str(nodes) == words
