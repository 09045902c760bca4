"""Environment variables of every job, in one place; a cluster file's ``environment`` wins."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from proma_megatron.launching.cluster import Cluster

DEFAULTS: Mapping[str, str] = {
    # Megatron orders a tensor-parallel collective before the GEMM that it overlaps by the order of
    # launches, which one hardware queue keeps.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # Ranks share a node's cores, and each would start a thread a core.
    "OMP_NUM_THREADS": "1",
    # A collective that fails on one rank ends the others too, instead of leaving them waiting.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "NCCL_DEBUG": "WARN",
    # Ranks tell themselves how they end; torchrun's own lines, and those of its store, bury that.
    "LOGLEVEL": "CRITICAL",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    # Jobs read models from disk: no rank may try to download one.
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Set by the batch script and by `node`; images may come with values of their own.
OF_THE_JOB = ("MASTER_ADDR", "MASTER_PORT")


def variables(cluster: Cluster) -> dict[str, str]:
    """Return what a job of this cluster gets, by name."""
    return {**DEFAULTS, **cluster.environment}


def for_nemo_run(cluster: Cluster) -> dict[str, str]:
    """Return `variables` as `SlurmExecutor.env_vars` takes them.

    NeMo-Run writes ``export NAME=value`` without quotes, and in capitals: other names are for
    `scripts.setup_lines`.
    """
    return {
        name: shlex.quote(value) for name, value in variables(cluster).items() if name.isupper()
    }


def in_small_letters(cluster: Cluster) -> dict[str, str]:
    """Return those of `variables` that NeMo-Run would rename, such as http_proxy."""
    return {name: value for name, value in variables(cluster).items() if not name.isupper()}


def of_a_container(cluster: Cluster) -> list[str]:
    """Return names whose values in the job prevail over those that an image sets."""
    return sorted({*variables(cluster), *cluster.secrets, *OF_THE_JOB})
