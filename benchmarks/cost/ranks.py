"""The ranks of one process group, which measure their settings one after the other."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cost.results import Results, line
from benchmarks.cost.settings import Effort, Setting, Shape
from proma_megatron.config.fields import Section
from proma_megatron.config.model import ParallelConfig
from proma_megatron.config.run import GradientsConfig
from proma_megatron.config.trainer import ProcessConfig
from proma_megatron.processes.ranks import run_on_ranks

if TYPE_CHECKING:
    from proma_megatron.distributed.topology import Topology

ROOT = Path(__file__).parents[2]
# Where the ways are compared with each other in float64; they have little to remember there.
AGREEMENT_SHAPE = Shape(hidden=128, layers=2, vocabulary=50)


class CostJob(Section):
    config: GradientsConfig
    settings: tuple[Setting, ...]  # of one tensor-parallel size
    effort: Effort
    out: Path  # results; what it holds is kept


def let_ranks_import() -> None:
    """Processes that are started from here find this package."""
    search = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, search))


def run_settings(settings: Sequence[Setting], effort: Effort, out: Path, device: str) -> None:
    """Measure settings, each tensor-parallel size in a process group of its own.

    Raises:
        ConfigError: there are too few GPUs for a layout.
        WorkerError: a rank failed.
    """
    let_ranks_import()
    for tensor in sorted({setting.tensor for setting in settings}):
        threads = max(1, len(os.sched_getaffinity(0)) // tensor)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        config = GradientsConfig.model_validate(
            {
                "device": device,
                "parallel": ParallelConfig(tensor=tensor),
                "trainer": ProcessConfig(threads=threads, timeout_minutes=30),
            }
        )
        mine = tuple(setting for setting in settings if setting.tensor == tensor)
        job = CostJob(config=config, settings=mine, effort=effort, out=out.resolve())
        run_on_ranks("benchmarks.cost.ranks", job, purpose="cost")


JOB = CostJob


def run(job: CostJob, topology: Topology) -> str | None:
    """All settings of a job, on this rank; rank 0 writes them down and says how they went."""
    from benchmarks.cost.measure import measure
    from benchmarks.cost.ways import disagreement, proma
    from proma_megatron.config.objective import ProjectionConfig
    from proma_megatron.model.build import build_policy

    results = Results.read(job.out) if topology.is_main else Results(job.out)

    longest = max(setting.tokens for setting in job.settings)
    for (tied, shape), group in groupby(job.settings, key=lambda s: (s.tied, s.shape)):
        mine = list(group)
        small = mine[0].model_copy(
            update={"shape": AGREEMENT_SHAPE, "tokens": 20, "sequences": 5, "microbatches": 3}
        )
        error = max(topology.gather_over_all(disagreement(small, topology)))
        policy = build_policy(shape.model(tied=tied), shape.vocabulary, longest, topology, seed=0)
        reused = proma(policy, ProjectionConfig())
        for setting in mine:
            row = measure(setting, policy, reused, job.effort, topology)
            if topology.is_main:
                results.add({**row, "disagreement_float64": error})
                print(line(setting, row), file=sys.stderr, flush=True)
        del policy, reused  # before the next model comes
    if topology.is_main:
        results.note({"machine": machine(topology)})
    return "{}" if topology.is_main else None


def machine(topology: Topology) -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    device: str = platform.processor()
    if topology.device.type == "cuda":
        device = torch.cuda.get_device_name(topology.device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        named = (text.split(":")[1].strip() for text in lines if text.startswith("model name"))
        device = next(named, device)
    return {
        "device": device,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "megatron": version("megatron-core"),
        "python": platform.python_version(),
    }
