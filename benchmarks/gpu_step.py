"""A step on one GPU, with PROMA and without: tokens/s, MFU and peak memory; docs/guide/gpu.md.

    uv run python benchmarks/gpu_step.py --json OUT.json --fp8 none current --markdown

On Qwen3's published shapes with random weights, two ways to accumulate the gradients of one step
run in turn on one policy: (plain) the layers' own weight gradients, (proma) the projection as it is
configured by default. A step is forward and backward over all microbatches, without the optimizer.
Operations are counted by formula, see `benchmarks/gpu/figures.py`; utilization is of the GPU's
published dense peak for the precision, though under FP8 attention, the head, and by default weight
gradients under the projection stay in bf16. Peak memory is what torch has allocated, weights and
gradients included. Where a way doesn't fit, the row says so. Rows are written as they are finished;
`--resume` keeps them. On a CPU only `--shape tiny` runs, to try the command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from benchmarks.gpu.rank import run_settings
from benchmarks.gpu.results import GpuResults
from benchmarks.gpu.settings import MICROBATCHES, SHAPES, TINY, Fp8, Recompute, Setting, grid
from benchmarks.gpu.table import table
from benchmarks.projection import positive
from proma_megatron.config.run import GradientsConfig
from proma_megatron.distributed.devices import check_backend, choose_device
from proma_megatron.errors import ConfigError, StoppedError
from proma_megatron.processes import logs


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="results, read and written")
    parser.add_argument("--markdown", action="store_true", help="print the table at the end")
    parser.add_argument("--resume", action="store_true", help="keep the rows of the JSON file")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=SHAPES[:-1])
    parser.add_argument("--layers", type=positive, help="fewer than the model has")
    parser.add_argument("--fp8", choices=get_args(Fp8), nargs="+", default=["none"])
    parser.add_argument("--fp8-operands", choices=("bfloat16", "fp8"), default="bfloat16")
    parser.add_argument(
        "--backend", choices=("auto", "torch", "transformer_engine"), default="auto"
    )
    parser.add_argument("--tokens", type=positive, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument(
        "--sequences", type=positive, help="of a microbatch; by default as its tokens allow"
    )
    parser.add_argument("--microbatch-tokens", type=positive, default=16384)
    parser.add_argument("--microbatches", type=positive, default=MICROBATCHES)
    parser.add_argument("--recompute", choices=get_args(Recompute), default="auto")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> list[Setting]:
    return grid(
        options.shape,
        options.fp8,
        options.tokens,
        budget=options.microbatch_tokens,
        sequences=options.sequences,
        layers=options.layers,
        microbatches=options.microbatches,
        backend=options.backend,
        fp8_operands=options.fp8_operands,
        recompute=options.recompute,
    )


def checked(settings: Sequence[Setting], requested: str) -> GradientsConfig:
    """The configuration of a process for the settings, of which every one can run there.

    Raises:
        ConfigError: one can't.
    """
    device = choose_device(requested, 1)
    for setting in settings:
        if device == "cpu" and setting.shape != TINY:
            raise ConfigError(
                f"--shape is {setting.shape}, which takes a GPU, and the run is on the CPU; use "
                f"--shape {TINY} to try the command"
            )
        try:
            config = setting.config(requested)
        except ValueError as error:
            raise ConfigError(f"{setting.name}: {error}") from None
        check_backend(config.model, device)
    return settings[0].config(requested)


def run(options: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: the options don't fit each other, the files or the machine.
        WorkerError: the process that measures failed.
    """
    settings = settings_of(options)
    config = checked(settings, options.device)
    results = GpuResults.begin(options.json, resume=options.resume)
    missing = results.missing(settings)
    if missing:
        run_settings(missing, options.rounds, options.json, config)
    if options.markdown:
        print("\n".join(table(GpuResults.read(options.json))))


def main() -> None:
    logs.configure()
    try:
        run(options_of())
    except (ConfigError, StoppedError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
