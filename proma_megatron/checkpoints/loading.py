"""Read a checkpoint, or the weights of a Hugging Face directory, into this layout."""

from __future__ import annotations

from pathlib import Path

from proma_megatron.checkpoints.compatibility import (
    check_model,
    check_optimizer,
    layout_of,
    why_no_scaling,
)
from proma_megatron.checkpoints.integrity import (
    check_contents,
    check_index,
    check_sizes,
    plain_values_only,
)
from proma_megatron.checkpoints.sharded import Contents, load_shards
from proma_megatron.config.run import RunConfig
from proma_megatron.distributed.topology import Topology
from proma_megatron.model.build import build_policy
from proma_megatron.model.policy import Policy
from proma_megatron.runs.checkpoint_folder import Marker, read_marker
from proma_megatron.weights.filling import fill
from proma_megatron.weights.huggingface import read_model


def load_checkpoint(path: Path, contents: Contents) -> Marker:
    """Read a checkpoint into the contents, in this layout, on all ranks; return its marker.

    The contents are what the checkpoint holds of them: what it does not hold is left as it is, but
    for an optimizer's copies of the weights. Without an optimizer, build one after this call.

    Raises:
        ConfigError: the folder is no complete checkpoint, or one of another model.
        StorageError: a file is missing, damaged or not what it should be. On every rank, and
            before anything is changed.
    """
    policy = contents.policy
    topology, model = policy.topology, policy.model
    marker = read_marker(path)
    check_model(path, marker, model, policy.vocab_size)
    if contents.optimizer is not None:
        check_optimizer(path, marker, model, contents.optimizer.config)

    def check() -> None:
        check_sizes(path, marker)
        check_contents(path, marker, topology.rank, topology.world_size)

    topology.agree(check)
    topology.agree(lambda: check_index(path))
    same_layout = marker.layout == layout_of(topology)
    held = Contents(
        policy=contents.policy,
        optimizer=contents.optimizer if "optimizer" in marker.holds else None,
        lagged=contents.lagged if "lagged" in marker.holds else None,
        random=contents.random and same_layout and "random" in marker.holds,
        scaling=contents.scaling and not why_no_scaling(marker, layout_of(topology)),
    )
    with plain_values_only():
        load_shards(str(path), held)
    if contents.optimizer is not None and held.optimizer is None:
        contents.optimizer.take_weights()
    return marker


def load_policy(
    config: RunConfig, vocab_size: int, checkpoint: Path | None, topology: Topology
) -> Policy:
    """Load a policy for sampling and reading, from a checkpoint or from ``config.model.path``.

    Raises:
        ConfigError, StorageError: as `load_checkpoint`.
    """
    # On this machine, whatever it was trained on; and rollouts don't compute in FP8.
    unbound = {"backend": "auto", "fp8": "none", "fp8_skip_first": 0, "fp8_skip_last": 0}
    policy = build_policy(
        config.model.model_copy(update=unbound),
        config.model.vocab_size or vocab_size,
        config.max_sequence_length,
        topology,
        seed=None,
        frozen=True,
    )
    if checkpoint is not None:
        load_checkpoint(checkpoint, Contents(policy))
    else:
        load_pretrained(config, policy)
    return policy


def load_pretrained(config: RunConfig, policy: Policy) -> None:
    """Fill the policy with the weights of ``config.model.path``.

    Each rank reads its own slices, one tensor at a time.
    """
    assert config.model.path is not None
    found = read_model(config.model.path, config.model, compare_head=False)
    fill(policy.shards, found.read)
