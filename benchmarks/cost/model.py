"""The cost model of docs/evidence/cost.md: a projected microbatch beside plain accumulation.

    uv run python -m benchmarks.cost.model OUT.json     # beside what was measured
    uv run python -m benchmarks.cost.model --gpus       # computed for models and GPUs

For GPUs it is computed: a weight of d entries, T tokens and k sequences in a microbatch; numbers of
b bytes. Plain accumulation takes 6 T d operations (forward, input gradient, weight gradient). Kept
sequence gradients add, beside the same operations, the Gram matrix, and they go to memory once and
are read twice; streamed ones take 2 T d operations more. Solves, vectors and Python are not in it.

On a CPU rates of GEMMs and of memory alone say too little: products of a few long rows run far from
both. There the terms are measured, one by one, see `kernels`.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, fields
from pathlib import Path

from benchmarks.cost.kernels import Terms, measure
from benchmarks.cost.results import Results, setting_of
from proma_megatron.projection.factors.materialization import Rates


@dataclass(frozen=True)
class Cost:
    """Of one weight entry and projected microbatch."""

    operations: float
    bytes: float

    def seconds(self, rates: Rates) -> float:
        return self.operations / rates.gemm + self.bytes / rates.memory


def plain(tokens: int) -> Cost:
    return Cost(6 * tokens, 0)


def kept(sequences: int, itemsize: int) -> Cost:
    """Beyond plain accumulation."""
    k = sequences
    products = 2 * k * (k + 1)
    # G is written and read twice; A is copied beside it, read with it, and read and written.
    traffic = (3 * k + 5) * itemsize
    return Cost(products, traffic)


def streamed(tokens: int, sequences: int) -> Cost:
    """Beyond plain accumulation, with blocks that stay in a cache."""
    return Cost(2 * tokens + 2 * sequences * (sequences + 1), 0)


@dataclass(frozen=True)
class Gpu:
    name: str
    rates: Rates  # what a good kernel is taken to reach


# Peaks of NVIDIA's data sheets (dense bfloat16 989 TFLOP/s; 3.35 and 4.8 TB/s), of which 45% of the
# operations and 80% of the bandwidth are taken to be reached.
GPUS = (
    Gpu("H100 SXM", Rates(0.45 * 989e12, 0.8 * 3.35e12)),
    Gpu("H200", Rates(0.45 * 989e12, 0.8 * 4.8e12)),
)
# Linear weights of one layer, from the published configurations.
MODELS = {
    "Qwen3-8B": (36, 4096, 12288, 32 * 128, 8 * 128),
    "Qwen3-32B": (64, 5120, 25600, 64 * 128, 8 * 128),
}
K, MICROBATCHES = 8, 8


def layer_entries(hidden: int, ffn: int, query: int, key: int) -> int:
    return hidden * (query + 2 * key) + query * hidden + 3 * hidden * ffn


def overhead(cost: Cost, tokens: int, rates: Rates) -> float:
    """Relative to plain accumulation, in a step whose first microbatch is not projected."""
    projected = (MICROBATCHES - 1) / MICROBATCHES
    return projected * cost.seconds(rates) / plain(tokens).seconds(rates)


def print_gpus() -> None:
    print(f"k = {K}, float32 gradients, {MICROBATCHES} microbatches; computed, not measured")
    print("| GPU | tokens a sequence | kept | streamed |\n|---|---|---|---|")
    for gpu in GPUS:
        for length in (256, 1024, 4096, 16384):
            tokens = K * length
            ways = (kept(K, 4), streamed(tokens, K))
            shares = " | ".join(f"{overhead(way, tokens, gpu.rates):.1%}" for way in ways)
            print(f"| {gpu.name} | {length:,} | {shares} |")
    print("\n| model | TP | workspace_mb that keeps a layer |\n|---|---|---|")
    for name, (_, *shape) in MODELS.items():
        for tensor in (4, 8):
            size = (K + 1) * 4 * layer_entries(*shape) / tensor
            print(f"| {name} | {tensor} | {2 * size / 2**20:,.0f} |")


def print_measured(path: Path) -> None:
    """Milliseconds that a projected microbatch takes beyond a plain one: measured, and by terms."""
    rows = sorted(Results.read(path).rows, key=lambda row: setting_of(row).name)
    names = [field.name for field in fields(Terms)]
    print(f"| setting | {' | '.join(names)} | model | measured |")
    print("|---|" + "---|" * (len(names) + 2))
    for row in rows:
        setting = setting_of(row)
        terms = measure(setting, row["threads"])
        times = row["rounds_seconds"]
        more = statistics.median(
            (ours - plain) / (setting.microbatches - 1)
            for ours, plain in zip(times["proma"], times["plain"], strict=True)
        )
        shown = [getattr(terms, name) for name in names] + [terms.extra, more]
        print(f"| {setting.name} | {' | '.join(f'{1e3 * found:.1f}' for found in shown)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", help="of benchmarks/projection.py")
    parser.add_argument("--gpus", action="store_true", help="models on GPUs")
    options = parser.parse_args()
    if options.gpus:
        print_gpus()
    if options.results is not None:
        print_measured(options.results)


if __name__ == "__main__":
    main()
