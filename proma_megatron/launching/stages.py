"""What an experiment runs: a training, or several, each with the stages that depend on it.

Stages are told in terms of the `proma` command alone; `scripts` and `executors` bring them onto
nodes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from proma_megatron.config.model import ParallelConfig
from proma_megatron.config.run import RunConfig
from proma_megatron.errors import ConfigError

CONFIG = "<config>"  # in a stage's arguments: where the job finds its configuration


@dataclass(frozen=True)
class Stage:
    """One job."""

    name: str  # "train", of one experiment
    arguments: tuple[str, ...]  # of `proma`
    parallel: ParallelConfig  # its ranks
    config: RunConfig  # of the run that it makes or reads; shipped where `arguments` names CONFIG
    after: str | None = None  # the stage that must have succeeded before

    @property
    def run_dir(self) -> PurePosixPath:
        """As the job sees it."""
        return PurePosixPath(self.config.run_dir.as_posix())

    @property
    def trains(self) -> bool:
        return self.after is None


def stages_of(
    configs: Sequence[RunConfig],
    *,
    evaluate: str | None = None,
    samples: int | None = None,
    export: str | None = None,
) -> list[Stage]:
    """Return a training for each configuration, and what follows each of them.

    Args:
        configs: with names of their own.
        evaluate: a file of problems, as the jobs see it; null: no evaluation.
        samples: completions of a problem.
        export: the directory to make within the run's; null: no export.
    """
    made: list[Stage] = []
    for config in configs:
        suffix = f"-{config.name}" if len(configs) > 1 else ""
        train = Stage(
            name=f"train{suffix}",
            arguments=("train", CONFIG, "--resume-or-start"),
            parallel=config.parallel,
            config=config,
        )
        made.append(train)
        if evaluate is not None:
            chosen = ("--samples", str(samples)) if samples is not None else ()
            made.append(
                Stage(
                    name=f"eval{suffix}",
                    # Once more after a requeue: what it wrote before is not complete.
                    arguments=(
                        "eval",
                        str(train.run_dir),
                        "--data",
                        evaluate,
                        *chosen,
                        "--overwrite",
                    ),
                    parallel=config.parallel,
                    config=config,
                    after=train.name,
                )
            )
        if export is not None:
            one = config.parallel.model_copy(update={"data": 1})
            made.append(
                Stage(
                    name=f"export{suffix}",
                    arguments=(
                        "export",
                        str(train.run_dir),
                        "--out",
                        str(train.run_dir / export),
                        "--overwrite",
                        "parallel.data=1",
                    ),
                    parallel=one,
                    config=config,
                    after=train.name,
                )
            )
    return made


def sweep(axes: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Return every combination of ``key=value,value`` axes: a suffix for the name, and overrides.

    Without axes there is one, with an empty suffix.

    Raises:
        ConfigError: an axis is none, or a key is there twice.
    """
    keys: list[str] = []
    choices: list[list[str]] = []
    for axis in axes:
        key, found, values = axis.partition("=")
        several = [value.strip() for value in values.split(",") if value.strip()]
        if not found or not key or not several:
            raise ConfigError(
                f"--sweep is '{axis}', expected key=value,value such as optimizer.lr=1e-6,2e-6"
            )
        if key in keys:
            raise ConfigError(f"--sweep has {key} twice; give all its values at once")
        if key == "name":
            raise ConfigError("--sweep is over name, which follows from the other keys; choose one")
        if len(set(several)) < len(several):
            raise ConfigError(f"--sweep is '{axis}', which has a value twice; leave one out")
        keys.append(key)
        choices.append(several)
    made: list[tuple[str, tuple[str, ...]]] = []
    for values in itertools.product(*choices):
        pairs = list(zip(keys, values, strict=True))
        words = [_plain(f"{key.rpartition('.')[2]}{value}") for key, value in pairs]
        made.append(("-".join(words), tuple(f"{key}={value}" for key, value in pairs)))
    names = [suffix for suffix, _ in made]
    if len(set(names)) < len(names):
        made = [(f"{suffix}-{place}", of) for place, (suffix, of) in enumerate(made, start=1)]
    return made


def _plain(text: str) -> str:
    """Make a text fit for a name of a directory."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_.-")
