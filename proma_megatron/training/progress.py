"""How far a run is, and what is saved of it: the position, skipped steps, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from proma_megatron.data.demonstrations import Demonstrations
from proma_megatron.data.loading import RunData
from proma_megatron.errors import NonFiniteError
from proma_megatron.files import disk_errors
from proma_megatron.learner.divergences import Divergences
from proma_megatron.learner.nonfinite import NonFiniteEvent, dump
from proma_megatron.learner.optimizer import Optimizer
from proma_megatron.learner.references import ReferencePolicies
from proma_megatron.training.checkpointing import Checkpointer
from proma_megatron.training.context import StepContext, Stopping
from proma_megatron.training.position import Position
from proma_megatron.types import StepReport


class Progress:
    """Where a run stands, on every rank.

    Between two steps the run has a `Position`, from which it can go on bit by bit as if nothing had
    happened.

    Attributes:
        position: after the last step.
        last_good: after the last step with an update.
        skipped_in_a_row: steps without any update, up to now.
        in_lagged_mean: whether the weights are in the lagged mean already.
        best: validation accuracy so far; -1 without one.
        optimizer: the warm start's, then RL's; None until it is built.
    """

    def __init__(
        self,
        context: StepContext,
        keeper: Checkpointer,
        data: RunData,
        demonstrations: Demonstrations,
        references: ReferencePolicies,
        divergences: Divergences,
    ) -> None:
        self.context, self.keeper = context, keeper
        self.data, self.demonstrations = data, demonstrations
        self.references, self.divergences = references, divergences
        self.position = self.last_good = Position()
        self.skipped_in_a_row = 0
        self.in_lagged_mean = False
        self.best = -1.0
        self.optimizer: Optimizer | None = None

    # ------------------------------------------------------------------ between steps

    def raise_if_stopping(self) -> None:
        """Look, where all ranks are in step and nothing would be lost, whether the run is to stop.

        Raises:
            Stopping: it is.
        """
        if self.keeper.saving:
            with self.context.phase("save"):
                self.keeper.poll()
        self.context.stops.note_save(self.keeper.longest_save)
        if self.context.stops.agreed() is not None:
            raise Stopping

    def move_to(self, phase: str, step: int, pending: StepReport | None = None) -> None:
        """Note that this step of "warm_start" or "rl" is done.

        Args:
            pending: the step's report, if its validation is still to come.
        """
        lagged = self.divergences.lagged
        self.position = Position(
            phase=phase,
            step=step,
            prompts=self.data.train.state(),
            demonstrations=self.demonstrations.state() if phase == "warm_start" else {},
            kl_coefficient=self.references.coefficient,
            lagged=0 if lagged is None else lagged.count,
            joined=self.in_lagged_mean,
            skipped=self.skipped_in_a_row,
            files=self.context.reporter.written(),
            pending=None if pending is None else asdict(pending),
        )

    def begin(self, phase: str) -> None:
        """Stand at the beginning of this phase."""
        self.move_to(phase, 0)
        self.last_good = self.position

    def take_up(self, position: Position) -> None:
        """Go on from a position that was saved."""
        self.data.train.restore(position.prompts)
        self.skipped_in_a_row, self.in_lagged_mean = position.skipped, position.joined
        if self.context.config.loss.kl.target is not None:
            self.references.coefficient = position.kl_coefficient
        self.position = self.last_good = position

    # ------------------------------------------------------------------ steps without an update

    def count_skipped(
        self,
        phase: str,
        step: int,
        metrics: Mapping[str, float],
        offences: list[NonFiniteEvent],
        updates: int = 1,
    ) -> None:
        """Count steps without any update, and write down what was to blame for a skipped one.

        Args:
            updates: that the step would have made.
        """
        none = metrics["optimizer/skipped"] >= updates
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if none else 0
        self.in_lagged_mean = self.in_lagged_mean and none
        for offence in offences:
            path = self.context.run_dir.nonfinite(
                step, offence.minibatch, offence.replica, offence.microbatch, phase
            )
            if self.context.topology.is_main:
                with disk_errors(path):
                    dump(offence, path)
            self.context.say(
                f"skipped an update of step {step}: the {offence.what} of a microbatch is not "
                f"finite; it is in {path}"
            )

    def stop_at_trouble(self) -> None:
        """Remember after a step where all was well, and give up when it has not been for long.

        Raises:
            NonFiniteError: the position before the trouble is saved.
        """
        most = self.context.config.trainer.max_skipped_steps
        if not self.skipped_in_a_row:
            self.last_good = self.position
        elif self.skipped_in_a_row >= most:
            # No update since: weights, and what delayed scaling remembers, are those of then. But
            # they have joined the mean.
            path = self.save(
                replace(self.last_good, joined=self.in_lagged_mean, lagged=self.position.lagged)
            )
            raise NonFiniteError(
                f"{self.skipped_in_a_row} steps in a row made no update, for none was finite, "
                f"expected fewer than trainer.max_skipped_steps={most}; the policy before them is "
                f"in {path}, their microbatches are in "
                f"{self.context.run_dir.path / 'nonfinite'}: lower optimizer.lr, or look at them "
                "with `proma grads`"
            )

    # ------------------------------------------------------------------ checkpoints

    def save(self, position: Position | None = None, score: float | None = None) -> Path:
        """Save this position, or the last one, with weights, optimizer and random states."""
        with self.context.phase("save"):
            return self.keeper.save(position or self.position, self.optimizer, score)

    def finish_save(self) -> None:
        """Complete the checkpoint that is being written, if there is one."""
        with self.context.phase("save"):
            self.keeper.finish()
