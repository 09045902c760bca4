"""`proma plan`: what a run needs, as tables or as JSON, before it is started."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from proma_megatron.config.loading import load_config
from proma_megatron.data.loading import vocabulary
from proma_megatron.planning.plan import make_plan
from proma_megatron.planning.printing import print_plan


def plan(
    path: Path,
    overrides: Sequence[str],
    *,
    gpu_memory: float,
    gpus_per_node: int,
    as_json: bool,
) -> bool:
    """Print the plan of the run that this file configures.

    Args:
        gpu_memory: GiB of one GPU that the run may use.
        as_json: one line of JSON instead of tables.

    Returns:
        Whether the run fits.

    Raises:
        ConfigError: the configuration doesn't fit, or what it reads is not there.
    """
    config = load_config(path, overrides)
    found = make_plan(
        config,
        vocabulary(config),
        gpu_memory=int(gpu_memory * 2**30),
        gpus_per_node=gpus_per_node,
    )
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        print_plan(found, Console())
    return found.fits
