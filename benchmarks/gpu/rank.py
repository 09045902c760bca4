"""The one rank that measures: a policy for each shape and precision, both ways in turn on it."""

from __future__ import annotations

import gc
import os
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.cost.ranks import let_ranks_import, machine
from benchmarks.cost.results import Row
from benchmarks.cost.settings import Effort
from benchmarks.gpu.figures import step_operations, utilization
from benchmarks.gpu.results import GpuResults
from benchmarks.gpu.settings import Setting
from proma_megatron.config.fields import Section
from proma_megatron.config.model import ModelConfig
from proma_megatron.config.run import GradientsConfig
from proma_megatron.distributed.libraries import transformer_engine_version
from proma_megatron.errors import ConfigError
from proma_megatron.processes.ranks import run_on_ranks

if TYPE_CHECKING:
    from benchmarks.cost.ways import Step
    from proma_megatron.distributed.topology import Topology
    from proma_megatron.model.policy import Policy
    from proma_megatron.types import Microbatch

WAYS = ("plain", "proma")
Recomputed = Literal["none", "full"]


class GpuJob(Section):
    config: GradientsConfig
    settings: tuple[Setting, ...]
    effort: Effort
    out: Path  # results; what it holds is kept


def run_settings(
    settings: Sequence[Setting], rounds: int, out: Path, config: GradientsConfig
) -> None:
    """Measure settings in a process of their own.

    Raises:
        ConfigError: there is no such GPU.
        WorkerError: the process failed.
    """
    let_ranks_import()
    os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    effort = Effort(ways=WAYS, seconds=0, least=rounds, most=rounds, limit=3600)
    job = GpuJob(config=config, settings=tuple(settings), effort=effort, out=out.resolve())
    run_on_ranks("benchmarks.gpu.rank", job, purpose="gpu")


JOB = GpuJob


def run(job: GpuJob, topology: Topology) -> str:
    results = GpuResults.read(job.out)
    mine = described(topology)
    before = results.notes.get("machine", mine)["device"]
    if results.rows and before != mine["device"]:
        raise ConfigError(
            f"--json is {job.out}, whose rows are of {before}, and this is {mine['device']}; give "
            "another file, or leave out --resume"
        )
    results.note({"machine": mine})
    bench = Bench(topology, job.effort, max(setting.tokens for setting in job.settings))
    for setting in job.settings:
        row = bench.measure(setting)
        results.add(row)
        print(line(setting, row), file=sys.stderr, flush=True)
    return "{}"


def described(topology: Topology) -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    found = machine(topology)
    if topology.device.type == "cuda":
        found["cuda"] = torch.version.cuda
        found["transformer_engine"] = transformer_engine_version()
    return found


# --------------------------------------------------------------------------- rows


@dataclass
class Measured:
    """What came out of the ways that fit into memory."""

    peaks: dict[str, int | None] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)


class Bench:
    """Measures one setting after the other; a policy is kept for those that share it."""

    def __init__(self, topology: Topology, effort: Effort, longest: int) -> None:
        self.topology = topology
        self.effort = effort
        self._longest = longest  # sequence
        self._key: object = None
        self._policy: Policy | None = None
        # By model, the fewest tokens of a microbatch that did not fit without recompute.
        self._too_many: dict[object, int] = {}

    def measure(self, setting: Setting) -> Row:
        """One row; with ``recompute: auto`` without it where both ways fit so."""
        if setting.recompute != "auto":
            return self._row(setting, setting.recompute)
        model, tokens = _model_of(setting), setting.tokens * setting.sequences
        if tokens < self._too_many.get(model, tokens + 1):
            row = self._row(setting, "none")
            if all(row["ways"][way] is not None for way in WAYS):
                return row
            self._too_many[model] = tokens
        return self._row(setting, "full")

    def _row(self, setting: Setting, recompute: Recomputed) -> Row:
        measured = Measured()
        with memory_errors():
            self._try(setting, recompute, measured)
        if len(measured.seconds) < len(WAYS):  # whatever was broken off has left its traces there
            self._key = self._policy = None
        _give_back(self.topology)
        return row_of(setting, recompute, measured, machine(self.topology)["device"])

    def _try(self, setting: Setting, recompute: Recomputed, measured: Measured) -> None:
        """Fill in what fits into memory, of each way."""
        from benchmarks.cost.measure import interleaved
        from benchmarks.cost.ways import drawn, plain, proma

        policy = self._policy_for(setting, recompute)
        microbatches = drawn(
            setting.tokens,
            setting.sequences,
            setting.microbatches,
            policy.vocab_size,
            self.topology.device,
            policy.token_multiple,
        )
        makes: dict[str, Callable[[], Step]] = {
            "plain": lambda: plain(policy),
            "proma": lambda: proma(policy, setting.projection),
        }
        steps: dict[str, Step] = {}
        for name, make in makes.items():
            with memory_errors():
                step = make()
                measured.peaks[name] = warmed_up(step, microbatches, self.topology)
                steps[name] = step
            _give_back(self.topology)
        if steps:
            measured.seconds |= interleaved(steps, microbatches, self.effort, self.topology)

    def _policy_for(self, setting: Setting, recompute: Recomputed) -> Policy:
        key = (_model_of(setting), recompute)
        if self._policy is None or key != self._key:
            self._policy = None  # before the next one comes
            _give_back(self.topology)
            model = setting.model(recompute)
            self._policy = random_policy(model, self._longest, self.topology)
            self._key = key
        return self._policy


def _model_of(setting: Setting) -> tuple[object, ...]:
    return setting.shape, setting.layers, setting.backend, setting.fp8


def row_of(setting: Setting, recompute: Recomputed, measured: Measured, device: str) -> Row:
    """``ways`` has None for one that did not fit, ``ratio`` if any did not."""
    from benchmarks.cost.measure import spread

    seconds = measured.seconds
    operations = setting.microbatches * step_operations(
        setting.model(recompute), setting.tokens, setting.sequences
    )

    def way(name: str) -> Row | None:
        if name not in seconds:
            return None
        median = statistics.median(seconds[name])
        return {
            "seconds": median,
            "rounds_seconds": seconds[name],
            "tokens_per_second": setting.step_tokens / median,
            "utilization": utilization(operations, median, device, setting.fp8),
            "peak_bytes": measured.peaks[name],
        }

    both = all(name in seconds for name in WAYS)
    ratios = zip(seconds["proma"], seconds["plain"], strict=True) if both else ()
    return {
        **setting.model_dump(),
        "recomputed": recompute,
        "operations": operations,
        "ways": {name: way(name) for name in WAYS},
        "ratio": spread([proma / plain for proma, plain in ratios]) if both else None,
    }


def random_policy(model: ModelConfig, longest: int, topology: Topology) -> Policy:
    """Weights are drawn on the device: which ones doesn't matter."""
    import torch

    from proma_megatron.model.build import build_policy

    assert model.vocab_size is not None
    policy = build_policy(model, model.vocab_size, longest, topology, seed=None)
    torch.manual_seed(0)
    with torch.no_grad():
        for shard in policy.shards:
            if shard.parameter.dim() > 1:  # norms are 1 already
                shard.parameter.normal_(0, model.init_std)
    return policy


def warmed_up(step: Step, microbatches: Sequence[Microbatch], topology: Topology) -> int | None:
    """Two steps; the most memory allocated during the second, weights and gradients included.

    None on a CPU.
    """
    import torch

    step(microbatches)
    if topology.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(topology.device)
    step(microbatches)
    torch.cuda.synchronize(topology.device)
    return torch.cuda.max_memory_allocated(topology.device)


def _give_back(topology: Topology) -> None:
    import torch
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    RotaryEmbedding.forward.cache_clear()  # keeps the last 32 models alive
    gc.collect()
    if topology.device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def memory_errors() -> Iterator[None]:
    """What runs out of the GPU's memory ends here, without a word."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # which hold what was allocated


def is_out_of_memory(error: BaseException) -> bool:
    """Also where a library asked the driver: torch has no class of its own for that."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(text in str(error) for text in ("out of memory", "ALLOC_FAILED"))


def line(setting: Setting, row: Row) -> str:
    """What is shown of a row while the benchmark runs."""
    shown = []
    for name in WAYS:
        way = row["ways"][name]
        shown.append(
            f"{name} out of memory"
            if way is None
            else f"{name} {way['seconds']:.3f} s, {way['tokens_per_second']:,.0f} tokens/s"
        )
    return f"{setting.name}, recompute {row['recomputed']}: {'   '.join(shown)}"
