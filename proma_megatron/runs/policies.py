"""Policies on disk: a Hugging Face directory, a run, or one of a run's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from proma_megatron.config.loading import apply_overrides, read_tree, validate_config
from proma_megatron.config.model import ComputeConfig
from proma_megatron.config.pretrained import CONFIG, read_json
from proma_megatron.config.run import RunConfig
from proma_megatron.errors import ConfigError
from proma_megatron.runs.checkpoint_folder import MARKER
from proma_megatron.runs.directory import RunDir

# How a Hugging Face model is evaluated where nothing else is said: room for a whole solution.
EVALUATION_DEFAULTS: dict[str, Any] = {
    "name": "evaluation",
    "rollout": {"max_prompt_tokens": 1024, "max_new_tokens": 2048},
}


@dataclass(frozen=True)
class PolicySource:
    """A policy that can be built: by a configuration, from a checkpoint or from Hugging Face."""

    config: RunConfig
    checkpoint: Path | None  # None: the weights are those of config.model.path
    run: RunDir | None

    @property
    def name(self) -> str:
        """For the names of files about it."""
        if self.checkpoint is None:
            assert self.config.model.path is not None
            return self.config.model.path.resolve().name
        return self.checkpoint.name


def open_policy(
    path: Path, overrides: Sequence[str] = (), settings: Path | None = None
) -> PolicySource:
    """Open what is at ``path``, with its configuration and these overrides.

    A run's weights come from its checkpoint, the newest if ``path`` is the run itself, and its
    tokenizer from the copy in its directory: the Hugging Face model it began with may be gone.

    Args:
        settings: for a Hugging Face directory, a training configuration whose prompts, rewards and
            layout apply.

    Raises:
        ConfigError: there is no policy at ``path``, or the configuration is not valid.
    """
    if (path / CONFIG).is_file():
        tree = read_tree(settings) if settings is not None else EVALUATION_DEFAULTS
        model = tree.get("model", {"dtype": _stored_dtype(path)})
        compute = {
            key: value
            for key, value in (model if isinstance(model, dict) else {}).items()
            if key in ("dtype", "recompute")
        }
        tree = {**tree, "model": {**compute, "path": str(path)}}
        return PolicySource(validate_config(apply_overrides(tree, overrides)), None, None)
    if settings is not None:
        raise ConfigError(
            f"--config is {settings}, but {path} is a run, which has its own; leave it out"
        )
    run, checkpoint = _find_run(path)
    tree = read_tree(run.config)
    return PolicySource(
        validate_config(apply_overrides(_own(tree, run), overrides)), checkpoint, run
    )


def _stored_dtype(path: Path) -> str:
    """Return what config.json says that the weights are, if we compute in it."""
    fields = read_json(path, CONFIG)
    found = str(fields.get("dtype") or fields.get("torch_dtype"))
    return found if found in get_args(ComputeConfig.model_fields["dtype"].annotation) else "float32"


def _find_run(path: Path) -> tuple[RunDir, Path]:
    """Return the run at this path, or around this checkpoint, and the checkpoint."""
    real = path.resolve()  # a checkpoint may be named from within its folder
    if (real / MARKER).is_file() or real.parent.name == "checkpoints":
        run, checkpoint = RunDir(real.parent.parent), real
        if not (path / MARKER).is_file():
            raise ConfigError(
                f"{path} is no complete checkpoint: it has no {MARKER}; choose another one"
            )
    else:
        run, checkpoint = RunDir(path), RunDir(path).latest_checkpoint()
    if not run.config.is_file():
        raise ConfigError(
            f"{path} is no Hugging Face directory ({CONFIG}), no run ({run.config.name}) and no "
            f"checkpoint of one ({MARKER}); check the path"
        )
    if checkpoint is None:
        raise ConfigError(f"{run.checkpoints} holds no complete checkpoint; let the run save one")
    return run, checkpoint


def _own(tree: Mapping[str, Any], run: RunDir) -> dict[str, Any]:
    """Return the run's configuration without what lies outside of its directory."""
    tokenizer = {**(tree.get("tokenizer") or {}), "path": str(run.own_tokenizer or run.tokenizer)}
    return {**tree, "tokenizer": tokenizer, "model": {**tree["model"], "path": None}}
