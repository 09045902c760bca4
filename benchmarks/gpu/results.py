"""The file of results of benchmarks/gpu_step.py."""

from __future__ import annotations

from benchmarks.cost.results import Results
from benchmarks.gpu.settings import Setting


class GpuResults(Results):
    """Rows have ``ways``, each None where the GPU had too little memory for it."""

    kind = Setting
