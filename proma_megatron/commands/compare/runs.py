"""Which runs a comparison consists of, with their configurations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proma_megatron.config.choices import ACCUMULATIONS, ALGORITHMS, rules_of
from proma_megatron.config.loading import apply_overrides, read_tree, validate_config
from proma_megatron.config.pretrained import SHAPE
from proma_megatron.config.run import RunConfig
from proma_megatron.errors import ConfigError
from proma_megatron.runs.directory import RunDir

Tree = dict[str, Any]  # a configuration as its file has it

INITIAL = "initial"


@dataclass(frozen=True)
class Planned:
    """One run of the comparison."""

    algorithm: str
    config: RunConfig

    @property
    def label(self) -> str:
        return f"{self.algorithm}, seed {self.config.seed}"


@dataclass(frozen=True)
class Comparison:
    """All runs of a comparison, in the order in which they are made."""

    folder: Path
    algorithms: tuple[str, ...]
    seeds: tuple[int, ...]
    initial: RunConfig | None  # makes the policy that RL starts from; None: it is there
    runs: tuple[Planned, ...]

    @property
    def policy(self) -> Path:
        """Where the policy of ``initial`` goes, as a Hugging Face directory."""
        return self.folder / "initial_policy"

    def made(self) -> list[Path]:
        """Return run directories of any algorithm and seed that the folder holds."""
        names = re.compile(rf"({'|'.join(ALGORITHMS)})_seed-?\d+")
        if not self.folder.is_dir():
            return []
        return sorted(
            path
            for path in self.folder.iterdir()
            if names.fullmatch(path.name) and RunDir(path).holds_run
        )


def read_comparison(
    path: Path, overrides: Sequence[str], algorithms: str, seeds: int, steps: int | None
) -> Comparison:
    """Plan the runs of a configuration file.

    Args:
        algorithms: names with commas between them.

    Raises:
        ConfigError: the file can't be read, and as `plan_runs`.
    """
    tree = apply_overrides(read_tree(path), overrides)
    names = [name.strip() for name in algorithms.split(",") if name.strip()]
    return plan_runs(tree, names, seeds, steps)


def plan_runs(
    tree: Tree, algorithms: Sequence[str], seeds: int, steps: int | None = None
) -> Comparison:
    """Plan the runs of a comparison, seed by seed: what is there early is a comparison already.

    For a seed, all algorithms see the same prompts in the same order (but for
    ``rollout.resampling_rounds``, which draws further ones as rewards want it), and all runs
    validate on the same problems. They also start from the same policy: that of ``model.path``, or
    the one that ``initial`` makes, by the configuration's warm start and of its seed.

    Args:
        tree: the configuration; what is for another algorithm only is left out of a run's.
        seeds: how many, from the configuration's own on.
        steps: RL steps of each run; None: the configuration's.

    Raises:
        ConfigError: an algorithm is unknown or named twice, or one of the configurations is not
            valid.
    """
    _check_algorithms(algorithms)
    if seeds < 1:
        raise ConfigError(f"--seeds is {seeds}, expected a count of at least 1")
    base = validate_config(tree, training=True)
    if steps is not None:
        tree = _with(tree, "trainer", steps=steps)
        base = validate_config(tree, training=True)
    if base.trainer.steps < 1:
        raise ConfigError(
            f"trainer.steps is {base.trainer.steps}, expected at least 1; give --steps"
        )
    folder = base.run_dir
    common = {**tree, "root": str(folder)}
    initial = None
    if base.model.path is None or base.warm_start.steps:
        initial = _with({**common, "name": INITIAL}, "trainer", steps=0)
    common = _with(common, "warm_start", steps=0)
    if not base.trainer.kl_lagged_every:
        common = _with(common, "trainer", kl_lagged_every=base.trainer.kl_every or 1)
    chosen = range(base.seed, base.seed + seeds)
    return Comparison(
        folder=folder,
        algorithms=tuple(algorithms),
        seeds=tuple(chosen),
        initial=None if initial is None else validate_config(initial, training=True),
        runs=tuple(
            Planned(algorithm, _validated(_of_algorithm(common, algorithm), algorithm, seed))
            for seed in chosen
            for algorithm in algorithms
        ),
    )


def started_from(config: RunConfig, policy: Path, tokenizer: Path) -> RunConfig:
    """Return this run with weights and tokenizer from there, its shape as in the policy's files."""
    tree = config.model_dump(mode="json")
    model = {key: value for key, value in tree["model"].items() if key not in SHAPE}
    tree["model"] = {**model, "path": str(policy)}
    # The tokenizer itself, not the policy's copy of it for transformers, which can't read every
    # SentencePiece model in the same way.
    return validate_config(_with(tree, "tokenizer", path=str(tokenizer)), training=True)


def _check_algorithms(algorithms: Sequence[str]) -> None:
    for algorithm in algorithms:
        if algorithm not in ALGORITHMS:
            raise ConfigError(
                f"--algorithms has '{algorithm}', expected names out of {', '.join(ALGORITHMS)}, "
                "with commas between them"
            )
        if algorithms.count(algorithm) > 1:
            raise ConfigError(f"--algorithms has '{algorithm}' more than once; name it once")
    if not algorithms:
        raise ConfigError(f"--algorithms is empty, expected names out of {', '.join(ALGORITHMS)}")


def _of_algorithm(tree: Tree, algorithm: str) -> Tree:
    """Return ``tree`` for this algorithm, without a rule or a loss that is not its own."""
    projection, loss = dict(tree.get("projection") or {}), dict(tree.get("loss") or {})
    if projection.get("rule") not in rules_of(algorithm):
        projection.pop("rule", None)
    if algorithm not in ACCUMULATIONS:
        loss.pop("kind", None)
    return {**tree, "algorithm": algorithm, "projection": projection, "loss": loss}


def _validated(tree: Tree, algorithm: str, seed: int) -> RunConfig:
    named = {**tree, "name": f"{algorithm}_seed{seed}", "seed": seed}
    try:
        return validate_config(named, training=True)
    except ConfigError as error:
        raise ConfigError(f"for {algorithm}: {error}") from None


def _with(tree: Tree, section: str, **changes: Any) -> Tree:
    """Return ``tree`` with these keys of a section changed."""
    return {**tree, section: {**(tree.get(section) or {}), **changes}}
