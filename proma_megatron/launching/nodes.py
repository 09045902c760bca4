"""How many nodes a layout takes, and how its ranks fall on them."""

from __future__ import annotations

from dataclasses import dataclass

from proma_megatron.config.model import ParallelConfig
from proma_megatron.errors import ConfigError
from proma_megatron.launching.cluster import Cluster


@dataclass(frozen=True)
class Nodes:
    """``count`` nodes with ``ranks`` processes and ``gpus`` GPUs on each."""

    count: int
    ranks: int
    gpus: int

    def __str__(self) -> str:
        nodes = f"{self.count} node{'s' if self.count > 1 else ''}"
        if self.gpus:
            return f"{nodes} x {self.gpus} GPU{'s' if self.gpus > 1 else ''}"
        return f"{nodes} x {self.ranks} rank{'s' if self.ranks > 1 else ''} on CPUs"


def nodes_for(parallel: ParallelConfig, cluster: Cluster) -> Nodes:
    """Return full nodes, or a part of a single one.

    Raises:
        ConfigError: the ranks don't fill whole nodes.
    """
    world, ranks = parallel.world_size, cluster.ranks
    if world > ranks and world % ranks:
        raise ConfigError(
            f"parallel.tensor x pipeline x data = {parallel.tensor} x {parallel.pipeline} x "
            f"{parallel.data or 1} = {world} ranks, expected at most {ranks} or a multiple of it, "
            f"for nodes have {ranks} each; change the layout (parallel.data, for example) or "
            f"{'gpus_per_node' if cluster.gpus_per_node else 'ranks_per_node'} of the cluster file"
        )
    count = max(1, world // ranks)
    on_each = world // count
    return Nodes(count, on_each, on_each if cluster.gpus_per_node else 0)


def note_on_tensor_parallel(parallel: ParallelConfig, nodes: Nodes) -> str | None:
    """Warn if tensor-parallel groups span nodes: every layer would wait for the network."""
    if parallel.tensor <= nodes.ranks:
        return None
    return (
        f"parallel.tensor={parallel.tensor} spans {-(-parallel.tensor // nodes.ranks)} nodes, "
        f"whose network every layer waits for; at most {nodes.ranks} stays within one"
    )
