"""What Slurm tells a task, in the variables that torch.distributed reads."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import MutableMapping

from proma_megatron.errors import ConfigError

logger = logging.getLogger(__name__)


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Give an srun task the variables that torchrun would have set.

    Raises:
        ConfigError: the first node's address can't be found out.
    """
    if "RANK" in environment or int(environment.get("SLURM_NTASKS", "1")) < 2:
        return
    if "SLURM_PROCID" not in environment or "SLURM_STEP_ID" not in environment:
        return  # inside an allocation, but not a task of srun
    tasks = int(environment["SLURM_NTASKS"])
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", "1")))
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=environment["SLURM_NTASKS"],
        LOCAL_RANK=environment["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(-(-tasks // nodes)),
    )
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = _first_node(environment)
    # Two jobs on one node must not meet.
    environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 20000))
    where = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    logger.debug("task %s of %s, to meet at %s", environment["RANK"], tasks, where)


def _first_node(environment: MutableMapping[str, str]) -> str:
    names = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_NODELIST"]
    if "[" not in names:
        return names.split(",")[0]
    try:
        shown = subprocess.run(
            ["scontrol", "show", "hostnames", names], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        raise ConfigError(
            f"the first of the nodes {names} can't be found out without scontrol; set MASTER_ADDR "
            "to its address"
        ) from None
    return shown.stdout.split()[0]
