"""What the projection costs beside plain accumulation, and beside hooks: docs/evidence/cost.md.

    uv run python benchmarks/projection.py --json OUT.json --png docs/evidence/cost.png

Three ways to accumulate the gradients of one step run in turn, on one Megatron model, batch and
layout: (plain) Megatron's own accumulation, (proma) ours as it is configured by default, (hooks)
float32 sequence gradients in Python loops beside the ordinary backward. A row has the medians of
their times and of the ratios within a round, the peak memory of each, and the collectives that a
projected microbatch adds. Rows are written as they are finished; `--resume` keeps them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cost.draw import draw
from benchmarks.cost.ranks import run_settings
from benchmarks.cost.results import Results
from benchmarks.cost.settings import MICROBATCHES, WAYS, Effort, Setting, grid
from proma_megatron.errors import ConfigError, StoppedError
from proma_megatron.processes import logs

QUICK = {"tensor": [1], "tokens": [64, 256], "sequences": [1, 8], "ends": "untied"}
ENDS = {"tied": [True], "untied": [False], "both": [False, True]}


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="results, read and written")
    parser.add_argument("--png", type=Path, help="a plot of the ratios")
    parser.add_argument("--draw", action="store_true", help="only draw what the JSON file holds")
    parser.add_argument("--resume", action="store_true", help="keep the rows of the JSON file")
    parser.add_argument("--quick", action="store_true", help="a few settings, for a first look")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--sequences", type=positive, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--tensor", type=positive, nargs="+", default=[1, 2])
    parser.add_argument("--ends", choices=tuple(ENDS), default="both", help="embedding and head")
    parser.add_argument("--microbatches", type=positive, default=MICROBATCHES)
    parser.add_argument("--seconds", type=float, default=20.0, help="of rounds, for one setting")
    parser.add_argument(
        "--repeats", type=positive, help="rounds of each setting, whatever it takes"
    )
    parser.add_argument(
        "--ways", choices=WAYS, nargs="+", default=WAYS, help="to leave out slow ones"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--quick" in given:
        parser.set_defaults(**QUICK)
    return parser.parse_args(given)


def settings_of(options: argparse.Namespace) -> list[Setting]:
    return grid(
        options.tensor,
        ENDS[options.ends],
        options.tokens,
        options.sequences,
        options.microbatches,
    )


def run(options: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: the options don't fit each other, the files or the machine.
        WorkerError: a rank failed.
    """
    if options.draw and options.png is None:
        raise ConfigError("--draw without --png has nowhere to draw to; give --png FILE.png")
    if not options.draw:
        settings = settings_of(options)
        effort = Effort(ways=tuple(options.ways), seconds=options.seconds)
        if options.repeats:
            effort = effort.model_copy(
                update={"seconds": 0, "least": options.repeats, "most": options.repeats}
            )
        results = Results.begin(options.json, resume=options.resume)
        run_settings(results.missing(settings), effort, options.json, options.device)
    if options.png:
        draw(Results.read(options.json).rows, options.png)


def main() -> None:
    logs.configure()
    try:
        run(options_of())
    except (ConfigError, StoppedError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
