"""What of a run is kept so that it can go on: where it stands, with weights and everything else."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from proma_megatron.checkpoints.compatibility import (
    layout_in_words,
    layout_of,
    optimizer_of,
    shape_of,
    why_no_scaling,
)
from proma_megatron.checkpoints.loading import load_checkpoint
from proma_megatron.checkpoints.saving import Retention, Saver, SaveReport
from proma_megatron.checkpoints.sharded import Contents
from proma_megatron.config.run import RunConfig
from proma_megatron.learner.optimizer import Optimizer
from proma_megatron.learner.snapshots import LaggedMean
from proma_megatron.model.policy import DTYPES, Policy
from proma_megatron.observability.reporter import Reporter
from proma_megatron.runs.checkpoint_folder import (
    BEST,
    Marker,
    best,
    checkpoints,
    is_complete,
    name_of,
    newest,
    point,
    read_marker,
    remove,
    write_marker,
)
from proma_megatron.runs.directory import RunDir
from proma_megatron.training.position import Position


class Checkpointer:
    """The keeper of the run's position and weights, which takes them up again. On every rank.

    Args:
        lagged: the running mean of earlier weights, if the run keeps one.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        run_dir: RunDir,
        reporter: Reporter,
        lagged: LaggedMean | None,
    ) -> None:
        self.config, self.policy, self.lagged = config, policy, lagged
        self.run_dir, self.reporter = run_dir, reporter
        trainer = config.trainer
        self.saver = Saver(
            policy.topology,
            run_dir.checkpoints,
            Retention(trainer.keep_last, trainer.keep_best),
            background=trainer.save_in_background,
            saved=self._saved,
        )
        self._longest = 0.0  # seconds that a save took, see `longest_save`
        self._with_optimizer = False  # whether one of them held the optimizer

    def save(
        self, position: Position, optimizer: Optimizer | None, score: float | None = None
    ) -> Path:
        """Save this position with the weights as they are now; one that is there stays.

        With saves in the background this returns before the checkpoint is complete.

        Args:
            score: validation accuracy of these weights.

        Raises:
            StorageError: the disk does not take it.
        """
        topology = self.policy.topology
        name = name_of(position.phase, position.step)
        path = self.run_dir.checkpoints / name
        # Only rank 0 looks: another node's file system may go on believing what it has seen.
        there = topology.is_main and (name == self.saver.current or is_complete(path))
        if topology.gather_over_all(there)[0]:  # writing it again would only put it at risk
            self._add_result(path, position, score)
            return path
        self.reporter.sync()
        lagged = self.lagged if position.lagged else None
        # Before its first update Adam has no state.
        updated = optimizer is not None and optimizer.updates > 0
        contents = self._contents(optimizer if updated else None, lagged)
        marker = Marker(
            phase=position.phase,
            step=position.step,
            state=asdict(position),
            model=shape_of(self.policy.model, self.policy.vocab_size),
            layout=layout_of(topology),
            optimizer=optimizer_of(self.policy.model, self.config.optimizer),
            holds=contents.names,
            score=score,
        )
        self.saver.save(name, contents, marker)
        self._with_optimizer |= updated
        return path

    @property
    def longest_save(self) -> float:
        """Seconds that a save may take: as the longest so far.

        Before the first one with Adam's state, that is as many times more as it will have bytes.
        """
        if self._with_optimizer:
            return self._longest
        size = DTYPES[self.policy.model.dtype].itemsize
        adam = 2 * max(4, size) + (4 if size < 4 else 0)  # moments, and float32 weights
        return self._longest * (size + adam) / size

    def _add_result(self, path: Path, position: Position, score: float | None) -> None:
        """Add a step's validation that came after its checkpoint."""
        if score is None or not self.policy.topology.is_main:
            return
        marker = read_marker(path)
        write_marker(path, replace(marker, state=asdict(position), score=score))
        point(self.run_dir.checkpoints, BEST, best(self.run_dir.checkpoints))

    def best_score(self) -> float:
        """Return the highest validation accuracy of a checkpoint; -1 if none has one."""
        found = best(self.run_dir.checkpoints) if self.policy.topology.is_main else None
        score = -1.0 if found is None else read_marker(found).score
        return self.policy.topology.gather_over_all(score)[0]

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written; the same on all ranks."""
        return self.saver.current is not None

    def poll(self) -> None:
        """Complete the checkpoint that is being written, if every rank has written its part."""
        if not any(self.policy.topology.gather_over_all(self.saver.busy)):
            self.saver.finish()

    def finish(self) -> None:
        """Complete the checkpoint that is being written, if there is one."""
        self.saver.finish()

    def _saved(self, saved: SaveReport) -> None:
        self._longest = max(self._longest, saved.seconds)
        self.reporter.message(str(saved))

    # ------------------------------------------------------------------ going on

    def newest(self) -> Path:
        """Return the checkpoint to go on from, and remove what is left of incomplete ones."""
        folder, topology = self.run_dir.checkpoints, self.policy.topology
        if topology.is_main:
            for path in checkpoints(folder):
                if not is_complete(path):
                    remove(path)
                    self.reporter.message(f"removed {path}, which was not complete")
        found = topology.gather_over_all(newest(folder) if topology.is_main else None)[0]
        assert found is not None, "prepare_run_dir refuses to resume without a checkpoint"
        return found

    def _contents(self, optimizer: Optimizer | None, lagged: LaggedMean | None) -> Contents:
        delayed = self.policy.model.fp8 == "delayed"
        return Contents(self.policy, optimizer, lagged, random=True, scaling=delayed)

    def load_initial(self) -> None:
        """Read the weights that RL started from."""
        load_checkpoint(self.run_dir.checkpoint(0), Contents(self.policy))

    def load(self, path: Path, optimizer: Optimizer | None) -> Position:
        """Read a checkpoint into the run; return where it stood.

        Raises:
            ConfigError, StorageError: as `load_checkpoint`.
        """
        lagged = self.lagged
        if lagged is not None:
            lagged.allocate()
        contents = self._contents(optimizer, lagged)
        marker = load_checkpoint(path, contents)
        position = Position(**marker.state)
        if lagged is not None:
            lagged.count = position.lagged if "lagged" in marker.holds else 0
        now = layout_of(self.policy.topology)
        if marker.layout != now:
            self.reporter.message(
                f"{path.name} was saved by {layout_in_words(marker.layout)} and goes on as "
                f"{layout_in_words(now)}"
            )
        if contents.scaling and (reason := why_no_scaling(marker, now)):
            self.reporter.message(f"delayed scaling begins anew: {path.name} {reason}")
        self.reporter.rewind(position.files)
        self.reporter.message(f"goes on from {path}")
        return position
