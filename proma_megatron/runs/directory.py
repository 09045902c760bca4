"""The directory of one run, ``runs/<name>``: what is in it, and who may write there.

config.yaml       the complete resolved configuration
environment.json  versions, git revision and device
metrics.jsonl     one line per step
samples.jsonl     a few rollouts of each step
tokenizer.model   a SentencePiece tokenizer, trained or copied
huggingface/      config and tokenizer of the model that the run began with
evaluation/       every completion of each validation
nonfinite/        microbatches of updates that were skipped, for `proma grads`
unscored_*.jsonl  rollouts that a failing reward function left without one
tensorboard/      event files
checkpoints/      weights, optimizer state and position
logs/             output of each rank, errors, Python stacks, why the run stopped, the profile
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from proma_megatron.config.run import RunConfig
from proma_megatron.errors import ConfigError
from proma_megatron.runs.checkpoint_folder import name_of, newest
from proma_megatron.runs.environment import (
    describe_environment,
)


@dataclass(frozen=True)
class RunDir:
    """The paths of one run; nothing here touches the disk but `write_environment`."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def rates(self) -> Path:
        """What the machine was measured to do; see `projection.choosing`."""
        return self.logs / "rates.json"

    @property
    def tokenizer(self) -> Path:
        """The SentencePiece model that this run trained, or was given."""
        return self.path / "tokenizer.model"

    @property
    def huggingface(self) -> Path:
        """Files of the Hugging Face model apart from its weights."""
        return self.path / "huggingface"

    def evaluation(self, step: int) -> Path:
        """Return the path of the completions of the validation after this step."""
        return self.path / "evaluation" / f"step_{step:06d}.jsonl"

    def nonfinite(
        self, step: int, minibatch: int, replica: int, microbatch: int, phase: str = "rl"
    ) -> Path:
        """Return the path for a microbatch whose loss, gradient or projection was not finite.

        Phases count their steps separately; that of ``phase``, unless "rl", is in the name.
        """
        place = f"minibatch_{minibatch}_replica_{replica}_microbatch_{microbatch}"
        prefix = "" if phase == "rl" else f"{phase}_"
        return self.path / "nonfinite" / f"{prefix}step_{step:06d}_{place}.jsonl"

    @property
    def own_tokenizer(self) -> Path | None:
        """The tokenizer that this run trained, or its copy of the one that it was given."""
        if self.tokenizer.is_file():
            return self.tokenizer
        names = ("tokenizer.json", "tokenizer.model", "vocab.json")
        kept = any((self.huggingface / name).is_file() for name in names)
        return self.huggingface if kept else None

    def unscored(self, step: int) -> Path:
        return self.path / f"unscored_step_{step:06d}.jsonl"

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the policy after so many RL steps."""
        return self.checkpoints / name_of("rl", step)

    def latest_checkpoint(self) -> Path | None:
        """Return the complete checkpoint that the run reached last, if there is one."""
        return newest(self.checkpoints)

    @property
    def folders(self) -> tuple[Path, ...]:
        data = (self.path / "evaluation", self.path / "nonfinite")
        return self.tensorboard, self.checkpoints, self.logs, *data

    @property
    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return self.config.exists() or self.metrics.exists()

    def write_environment(self, device: str) -> None:
        """Record `describe_environment` in environment.json."""
        self.environment.write_text(json.dumps(describe_environment(device), indent=2) + "\n")


def resumes(path: Path) -> bool:
    """Tell whether ``--resume-or-start`` finds a run to go on with; anything else is overwritten.

    Under torchrun and srun every rank may ask: before all of them are there, no checkpoint appears.

    Raises:
        ConfigError: the run has trained, but its checkpoints are gone.
        StorageError: its checkpoints can't be listed.
    """
    run_dir = RunDir(path)
    if not run_dir.holds_run:
        return False
    if run_dir.latest_checkpoint() is not None:
        return True
    if _has_trained(run_dir.metrics):
        # Before its first step a run saves: what can't be found now was there.
        raise ConfigError(
            f"{path} has reported RL steps but holds no complete checkpoint, which is no reason to "
            "overwrite it; bring its checkpoints back, or start again with --overwrite"
        )
    return False


def _has_trained(metrics: Path) -> bool:
    if not metrics.is_file():
        return False
    rows = metrics.read_text(errors="replace").splitlines()
    return any('"phase": "rl"' in row and not row.startswith('{"step": 0,') for row in rows)


def prepare_run_dir(path: Path, resume: bool, overwrite: bool) -> RunDir:
    """Create ``path`` with its folders, or take over the run that it holds. For rank 0 alone.

    ``overwrite`` removes the files and folders of an earlier run and leaves everything else in the
    directory alone; ``resume`` keeps all of it.

    Raises:
        ConfigError: the directory can't be used this way, or can't be written.
    """
    run_dir = RunDir(path)
    if resume and overwrite:
        raise ConfigError(f"run directory {path} can't be both resumed and overwritten; choose one")
    if path.exists() and not path.is_dir():
        raise ConfigError(
            f"run directory {path} is a file, expected a directory; use another name or root"
        )
    if resume and not run_dir.holds_run:
        raise ConfigError(f"{path} holds no run to resume; check the name, or start without resume")
    if resume and run_dir.latest_checkpoint() is None:
        raise ConfigError(
            f"{run_dir.checkpoints} holds no complete checkpoint to resume from; start again with "
            "--overwrite or --resume-or-start"
        )
    if run_dir.holds_run and not (resume or overwrite):
        raise ConfigError(
            f"{path} already holds a run; pass --resume or --overwrite, or use another name"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Permission bits don't tell about root, read-only mounts or squashed network users.
        with tempfile.TemporaryFile(dir=path):
            pass
        if overwrite and run_dir.holds_run:
            _remove_run(run_dir)
        for folder in run_dir.folders:
            folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run directory {path} can't be written ({error.strerror}); "
            "use a root that you may write to"
        ) from None
    return run_dir


def _remove_run(run_dir: RunDir) -> None:
    for file in run_dir.path.glob("unscored_step_*.jsonl"):
        file.unlink()
    run_dir.tokenizer.unlink(missing_ok=True)
    # config.yaml goes last: while it is there, an interrupted removal still reads as a run.
    for folder in (*run_dir.folders, run_dir.huggingface):
        if folder.is_symlink():
            folder.unlink()  # what a link points to may be another run's
        elif folder.exists():
            shutil.rmtree(folder)
    for file in (run_dir.samples, run_dir.environment, run_dir.metrics, run_dir.config):
        file.unlink(missing_ok=True)


def with_own_tokenizer(config: RunConfig) -> RunConfig:
    """Return a resumed run's configuration with the tokenizer that the run has kept."""
    kept = RunDir(config.run_dir).own_tokenizer
    if kept is None:
        return config
    return config.model_copy(
        update={
            "tokenizer": config.tokenizer.model_copy(update={"path": kept}),
            "model": config.model.model_copy(update={"path": None}),
        }
    )
