"""NeMo-Run executors: from a cluster file, or for this machine."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Any

import nemo_run as run

from proma_megatron.launching.cluster import Cluster, SshConfig
from proma_megatron.launching.environment import (
    DEFAULTS,
    for_nemo_run,
    in_small_letters,
    of_a_container,
)
from proma_megatron.launching.nodes import Nodes
from proma_megatron.launching.scripts import SIGNAL, setup_lines
from proma_megatron.launching.shipping import checkout, revision


def slurm_executor(
    cluster: Cluster, nodes: Nodes, *, resumes: bool = True, config: Path | None = None
) -> Any:
    """Tell NeMo-Run what it needs to know of a cluster and of the nodes that a job takes.

    The batch script exports MASTER_ADDR and MASTER_PORT, and queues the job again that ends with
    75. A task runs once on each node; with ``launcher="torchrun"`` NeMo-Run starts its ranks.

    Args:
        resumes: whether tasks save and stop by SIGUSR1, which comes before the time limit, and go
            on in the next attempt.
        config: a file that goes beside the code.

    Returns:
        `nemo_run.SlurmExecutor`.

    Raises:
        ConfigError: there is no code to ship.
    """
    wanted = {name: value for name, value in cluster.sbatch.items() if value is not False}
    more: dict[str, Any] = {"kill_on_invalid_dep": "yes", **wanted}
    if cluster.reservation is not None:
        more["reservation"] = cluster.reservation
    gpus = nodes.gpus or None
    by_gres = cluster.gpu_request == "gres"
    container = cluster.container
    return run.SlurmExecutor(
        account=cluster.account,
        partition=cluster.partition,
        qos=cluster.qos,
        constraint=cluster.constraint,
        exclude=cluster.exclude,
        exclusive=cluster.exclusive or None,
        time=cluster.time,
        nodes=nodes.count,
        ntasks_per_node=1,
        cpus_per_task=cluster.cpus_per_node,
        mem=cluster.mem,
        gpus_per_node=gpus if cluster.gpu_request == "gpus_per_node" else None,
        gres=f"gpu:{gpus}" if gpus and by_gres else None,
        torchrun_nproc_per_node=nodes.ranks,
        signal=f"{SIGNAL}@{60 * cluster.stop_minutes}" if resumes else None,
        additional_parameters=more,
        srun_args=list(cluster.srun) or None,
        container_image=container.image if container else None,
        container_mounts=list(container.mounts) if container else [],
        container_env=of_a_container(cluster) if container else None,
        env_vars=for_nemo_run(cluster),
        setup_lines=setup_lines(
            cluster.setup,
            in_small_letters(cluster),
            max_requeues=cluster.max_requeues if resumes else 0,
            requeue_failures=cluster.requeue_failures,
        ),
        retries=0,  # NeMo-Run would requeue whatever the exit code: `setup_lines` looks at it
        tunnel=_tunnel(cluster.ssh),
        packager=_packager(cluster, config),
        poll_estimated_start_time=False,
    )


def local_executor() -> Any:
    """Return this machine as NeMo-Run's `LocalExecutor`; a script of ours starts torchrun.

    What the shell says of `environment.DEFAULTS` prevails.
    """
    search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    own = {name: os.environ.get(name, value) for name, value in DEFAULTS.items()}
    return run.LocalExecutor(env_vars={**own, "PATH": search})


def _tunnel(ssh: SshConfig | None) -> Any:
    if ssh is None:
        return run.LocalTunnel(job_dir="")  # $NEMORUN_HOME/experiments: it copies nothing
    return run.SSHTunnel(
        host=ssh.host,
        user=ssh.user,
        port=ssh.port,
        identity=None if ssh.identity is None else str(ssh.identity),
        job_dir=ssh.job_dir,
        pre_command=ssh.before,
    )


def _packager(cluster: Cluster, config: Path | None) -> Any:
    file, folder = ("", "") if config is None else (str(config), str(config.parent))
    commit = revision(cluster)
    if commit is not None:
        return run.GitArchivePackager(
            basepath=str(checkout()),
            ref=commit,
            include_submodules=False,
            include_pattern=file,
            include_pattern_relative_path=folder,
        )
    if config is None:
        return run.Packager()
    return run.PatternPackager(include_pattern=file, relative_path=folder)
