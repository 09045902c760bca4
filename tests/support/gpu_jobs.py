"""Jobs for a rank on a GPU, most of which run on a CPU as well; and for its benchmark."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost import ways
from benchmarks.cost.settings import Effort
from benchmarks.gpu import rank
from benchmarks.gpu.settings import Setting
from proma_megatron.config.model import ModelConfig, ParallelConfig
from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.distributed.topology import layout
from proma_megatron.learner.gradients import accumulate, denominator, replica_share
from proma_megatron.learner.schedule import forward_backward
from proma_megatron.losses.options import UNIT
from proma_megatron.model.policy import Policy
from proma_megatron.projection.accumulator import Accumulator
from proma_megatron.projection.factors.gemm import ApexGemm, TransformerEngineGemm
from proma_megatron.projection.fp8_gate import GateFigures
from proma_megatron.projection.rules.proma import Rule, solve
from proma_megatron.types import PackedSequences
from support.engines import Engine
from support.gradients import Batch, _main_grads, _policy

ONE = ParallelConfig()

# --------------------------------------------------------------------------- the benchmark


def counted_operations(device: torch.device, setting: Setting) -> dict[str, int]:
    """Of forward and backward of one microbatch, plain, as torch's counter sees them."""
    with layout(ONE, device, 0) as topology:
        policy = rank.random_policy(setting.model("none"), setting.tokens, topology)
        microbatches = ways.drawn(
            setting.tokens, setting.sequences, 1, policy.vocab_size, topology.device
        )
        with FlopCounterMode(display=False) as counter:
            ways.plain(policy)(microbatches)
    found = {str(kind): count for kind, count in counter.get_flop_counts()["Global"].items()}
    attention = [kind for kind in found if "scaled_dot_product" in kind]
    return {
        "linear": sum(count for kind, count in found.items() if kind not in attention),
        "attention forward": sum(found[kind] for kind in attention if "backward" not in kind),
    }


def refused_memory(
    device: torch.device, settings: list[Setting], refused: set[tuple[str, str]]
) -> tuple[Any, Any, list[str]]:
    """Two rows, where ways and builds of a model ask for too much, by what is recomputed.

    Returns:
        The rows, and what was recomputed in each attempt.
    """
    tries: list[str] = []

    def check(name: str) -> None:
        if (name, tries[-1]) in refused:
            raise torch.OutOfMemoryError(f"{name} is too large")

    def refusing(name: str, make: Any) -> Any:
        def made(*arguments: Any) -> Any:
            check(name)
            return make(*arguments)

        return made

    row = rank.Bench._row

    def noted(bench: Any, setting: Setting, recompute: Any) -> Any:
        tries.append(recompute)
        return row(bench, setting, recompute)

    effort = Effort(seconds=0, least=1, most=1)
    with (
        layout(ONE, device, 0) as topology,
        mock.patch.object(ways, "plain", refusing("plain", ways.plain)),
        mock.patch.object(ways, "proma", refusing("proma", ways.proma)),
        mock.patch.object(rank, "random_policy", refusing("build", rank.random_policy)),
        mock.patch.object(rank.Bench, "_row", noted),
    ):
        bench = rank.Bench(topology, effort, 64)
        first, second = map(bench.measure, settings)
    return first, second, tries


# --------------------------------------------------------------------------- gradients


def capabilities(device: torch.device) -> tuple[tuple[int, int], tuple[int, int]]:
    """Compute capability of the GPU, and the version of CUDA that torch is built for.

    Asked for here, as a process that has asked can't fork ranks.
    """
    major, minor = (torch.version.cuda or "0.0").split(".")[:2]
    return torch.cuda.get_device_capability(device), (int(major), int(minor))


@contextlib.contextmanager
def _rounded(device: torch.device, model: ModelConfig) -> Iterator[Policy]:
    """A policy whose weights are bfloat16 numbers, whatever it computes in."""
    with _policy(device, model, ONE) as policy:
        with torch.no_grad():
            for shard in policy.shards:
                shard.parameter.copy_(shard.parameter.bfloat16())
        yield policy


def gradients_of_rounded_weights(
    device: torch.device, model: ModelConfig, projection: ProjectionConfig, batch: Batch
) -> dict[str, torch.Tensor]:
    """By Hugging Face name, on the CPU; of rule "none" those of the layers themselves."""
    _forget_scales(model)
    with _rounded(device, model) as policy:
        assert policy.backend == model.backend
        accumulate(policy, replica_share(batch, 0, 1, policy, denominator(batch)), projection)
        return {name: found.cpu() for name, found in _main_grads(policy).items()}


def gate_figures(
    device: torch.device, model: ModelConfig, projection: ProjectionConfig, batch: Batch
) -> GateFigures | None:
    """What the validity gate says of one pass."""
    _forget_scales(model)
    with _rounded(device, model) as policy:
        accumulator = Accumulator.of(policy, projection)
        gate = accumulator.gate
        assert gate is not None
        microbatches = replica_share(batch, 0, 1, policy, denominator(batch))
        gate.arm(microbatches)
        forward_backward(policy, microbatches, UNIT, accumulator=accumulator)
        return gate.figures(policy.topology)


def _forget_scales(model: ModelConfig) -> None:
    """Delayed scaling would go on with the maxima of an earlier policy."""
    if model.fp8 == "none":
        return
    from support.te_jobs import _forget_scales

    _forget_scales()


# --------------------------------------------------------------------------- products


def products(
    device: torch.device, engine: Engine, lengths: tuple[int, ...], rows: tuple[int, int]
) -> dict[str, float]:
    """Relative errors of a library's products of bfloat16 operands, by what was formed.

    Args:
        rows: of a fused weight that gradients are formed of; its main gradient gains all.
    """
    generator = torch.Generator().manual_seed(0)
    total, width, height = sum(lengths) + 3, 96, 160
    sequences = PackedSequences.of(lengths, total, device)
    x = torch.randn(total, width, generator=generator).bfloat16()
    dy = torch.randn(total, height, generator=generator).bfloat16()
    start = torch.randn(height, width, generator=generator)
    low, high = rows
    gemm = TransformerEngineGemm() if engine == "transformer_engine" else ApexGemm()
    mine = [gemm.operand(values.to(device), torch.float32) for values in (x, dy)]

    found = torch.full((len(lengths), high - low, width), torch.nan, device=device)
    gemm.sequence_gradients(mine[1][:, low:high], mine[0], sequences, found)
    expected = torch.stack(
        [
            dy[begin:end, low:high].double().t() @ x[begin:end].double()
            for begin, end in pairwise(sequences.offsets)
        ]
    )
    grown = start.to(device, copy=True)
    gemm.accumulate(mine[1], mine[0], grown)
    part = start.to(device, copy=True)
    gemm.accumulate(mine[1][:, low:high], mine[0], part[low:high])
    whole = start.double() + dy.double().t() @ x.double()
    partly = start.double()
    partly[low:high] = whole[low:high]
    return {
        "sequences": _error(found, expected),
        "accumulated": _error(grown, whole),
        "accumulated rows": _error(part, partly),
    }


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.cpu().double() - expected).norm() / expected.norm())


# --------------------------------------------------------------------------- the host


def backward_without_waiting(
    device: torch.device,
    model: ModelConfig,
    projection: ProjectionConfig,
    batch: Batch,
    waits: bool = False,
) -> list[int]:
    """Indices of microbatches whose backward ran while torch made every wait for the GPU an error.

    From `Accumulator.begin_backward` to the end of that backward pass, in a second step: what a
    library does once is not what is looked for.

    Args:
        waits: wait once, to see that it is an error.
    """
    looked: list[int] = []
    with _policy(device, model, ONE) as policy:
        accumulator = Accumulator.of(policy, projection)
        microbatches = replica_share(batch, 0, 1, policy, denominator(batch))
        forward_backward(policy, microbatches, UNIT, accumulator=accumulator)
        begin, end = accumulator.begin_backward, accumulator._end_backward

        def begun(chunk: int, microbatch: Any) -> None:
            torch.cuda.set_sync_debug_mode("error")
            begin(chunk, microbatch)
            if waits:
                microbatch.advantages.sum().item()

        def ended() -> None:
            index = accumulator.groups.microbatch.index
            end()
            torch.cuda.set_sync_debug_mode("default")
            looked.append(index)

        accumulator.begin_backward = begun
        accumulator._end_backward = ended
        try:
            forward_backward(policy, microbatches, UNIT, accumulator=accumulator)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return looked


def solved(
    device: torch.device, rule: Rule, bound: float | None, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What one microbatch changes in units (units, n), and which of them are finite.

    Of sequences that are independent, graded in length, alike, equal, each there twice, partly
    without gradient, without any, and not finite.
    """
    generator = torch.Generator().manual_seed(k)
    free = torch.randn(k, 60, generator=generator, dtype=torch.float64)
    graded = free * torch.logspace(-6, 3, k, dtype=torch.float64)[:, None]
    silent, bad = free.clone(), free.clone()
    silent[::2] = 0
    bad[0, 0] = torch.nan
    kinds = [free, graded, free[:1] + 0.1 * free, free[:1].expand(k, -1)]
    kinds += [free[torch.arange(k) // 2], silent, 0 * free, bad]
    gradients = torch.stack(kinds)
    accumulated = torch.randn(len(kinds), 60, generator=generator, dtype=torch.float64)
    advantages = torch.randn(k, generator=generator, dtype=torch.float64)
    gram, overlap = gradients @ gradients.mT, (gradients @ accumulated[..., None])[..., 0]
    found = solve(
        rule,
        gram.to(device),
        overlap.to(device),
        advantages.to(device),
        shrinkage=1.0,
        bound=bound,
        cutoff=1e-11,
    )
    finite = found.finite.cpu()
    change = (gradients[finite].mT @ found.coefficients.cpu()[finite][..., None])[..., 0]
    return change, finite
