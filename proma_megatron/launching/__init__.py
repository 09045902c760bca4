"""Bring a training to a Slurm cluster, or onto this machine, through NeMo-Run.

Nothing here loads training code, and training loads nothing of this. In the order of a job's way:

cluster       what a cluster file says
nodes         how many nodes a layout takes
stages        what is to run: trainings, evaluations, exports, sweeps
shipping      code and configuration that travel with a job
environment   its variables, in one place
scripts       its shell: on the first node, and on each of them
executors     NeMo-Run's executors
experiments   NeMo-Run's experiments: shown, submitted
local         run on this machine
submitted     what was submitted before
connection    ask a cluster, over SSH or here
states        how jobs are doing
logs          what they print, in every attempt
cli           `proma launch`

For people who use NeMo-Run themselves: `load_cluster`, `nodes_for` and `slurm_executor` give a
`nemo_run.SlurmExecutor`, and `stages_of` with `build` a `nemo_run.Experiment`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proma_megatron.launching.cluster import Cluster, load_cluster
    from proma_megatron.launching.executors import local_executor, slurm_executor
    from proma_megatron.launching.experiments import build, dry_run, submit
    from proma_megatron.launching.local import run_here
    from proma_megatron.launching.nodes import Nodes, nodes_for
    from proma_megatron.launching.shipping import for_cluster
    from proma_megatron.launching.stages import Stage, stages_of, sweep

__all__ = [
    "Cluster",
    "Nodes",
    "Stage",
    "build",
    "dry_run",
    "for_cluster",
    "load_cluster",
    "local_executor",
    "nodes_for",
    "run_here",
    "slurm_executor",
    "stages_of",
    "submit",
    "sweep",
]

_WHERE = {
    "cluster": ("Cluster", "load_cluster"),
    "executors": ("local_executor", "slurm_executor"),
    "experiments": ("build", "dry_run", "submit"),
    "local": ("run_here",),
    "nodes": ("Nodes", "nodes_for"),
    "shipping": ("for_cluster",),
    "stages": ("Stage", "stages_of", "sweep"),
}


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for: NeMo-Run takes seconds, and `proma` imports this file."""
    for module, names in _WHERE.items():
        if name in names:
            return getattr(import_module(f"proma_megatron.launching.{module}"), name)
    raise AttributeError(f"module 'proma_megatron.launching' has no attribute '{name}'")
