"""The run: a supervised warm start, then RL steps, to the end or from the newest checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from proma_megatron.checkpoints.loading import load_pretrained
from proma_megatron.distributed import libraries
from proma_megatron.errors import NonFiniteError, RewardError, RunStopped
from proma_megatron.learner.divergences import Divergences
from proma_megatron.learner.learner import Learner
from proma_megatron.learner.optimizer import Optimizer
from proma_megatron.learner.snapshots import WeightSnapshot
from proma_megatron.rewards.pool import Scorer
from proma_megatron.runs.checkpoint_folder import is_warm_start
from proma_megatron.training.context import StepContext, Stopping
from proma_megatron.training.progress import Progress
from proma_megatron.training.rl_step import RLStep
from proma_megatron.training.warm_start import WarmStart
from proma_megatron.types import StepReport


class TrainingRun:
    """One run on this rank, of parts that `build` has made. Every rank has one, and calls `run`."""

    def __init__(
        self,
        context: StepContext,
        progress: Progress,
        warm_start: WarmStart,
        rl_step: RLStep,
        learner: Learner,
        divergences: Divergences,
        scorer: Scorer,
    ) -> None:
        self.context, self.progress = context, progress
        self.warm_start, self.rl_step = warm_start, rl_step
        self.learner, self.divergences, self.scorer = learner, divergences, scorer

    def run(self, resume: bool = False) -> None:
        """Train to the end, from the beginning or from the newest checkpoint.

        Raises:
            RunStopped: it was asked to stop early, and has saved where it stands.
            RewardError: the reward function failed; all but the step in progress is saved, and the
                rollouts of that one are written down.
            NonFiniteError: too many steps in a row had no finite gradient; what was there before
                them is saved.
            StorageError: the disk does not take what the run has to keep.
        """
        context, policy = self.context, self.learner.policy
        if context.topology.device.type == "cuda":
            for line in libraries.in_use(policy.backend, context.config.model.fp8):
                context.say(line)
        with self._profiled(), self._kept():
            newest = self.progress.keeper.newest() if resume else None
            if newest is None or is_warm_start(newest):
                self._begin(newest)
                self.warm_start.run()
                self._begin_rl()
            else:
                self._resume(newest)
            if self.divergences.initial is None:
                self.divergences.initial = WeightSnapshot(policy)
            self.learner.check_capture()
            if context.config.trainer.steps:  # else only the policy that RL would start from
                self._reinforce()
            self.progress.finish_save()

    def close(self) -> None:
        """End the scoring processes."""
        self.scorer.close()

    # ------------------------------------------------------------------ phases

    def _begin(self, newest: Path | None) -> None:
        """Load the policy, build the warm start's optimizer, take up where that was if it was."""
        context, progress = self.context, self.progress
        with context.setup():
            if newest is None and context.config.model.path is not None:
                load_pretrained(context.config, self.learner.policy)
                context.say(f"loaded the weights of {context.config.model.path}")
            progress.optimizer = self.warm_start.build_optimizer()
            if newest is None:
                progress.begin("warm_start")
            else:
                progress.take_up(progress.keeper.load(newest, progress.optimizer))
                progress.demonstrations.restore(progress.position.demonstrations)

    def _begin_rl(self) -> None:
        """Build RL's optimizer, and save the checkpoint that divergences are measured to."""
        progress = self.progress
        progress.optimizer = None  # the warm start's goes before its successor comes
        progress.skipped_in_a_row = 0
        progress.optimizer = self._build_optimizer()
        progress.begin("rl")
        progress.save()

    def _resume(self, newest: Path) -> None:
        """Load the newest checkpoint of RL, and the policy that RL started from."""
        progress = self.progress
        with self.context.setup():
            progress.keeper.load_initial()
            self.divergences.initial = WeightSnapshot(self.learner.policy)
            progress.optimizer = self._build_optimizer()
            progress.take_up(progress.keeper.load(newest, progress.optimizer))
            progress.best = progress.keeper.best_score()

    def _reinforce(self) -> None:
        """Make RL steps, from where the run stands to the last."""
        context, position = self.context, self.progress.position
        total = context.config.trainer.steps
        context.reporter.start("rl", total, completed=position.step)
        context.phases.step = position.step
        if position.pending is not None:
            self.rl_step.conclude(StepReport(**position.pending))
        elif position.step == 0:
            self.rl_step.validate_first()
        for step in range(position.step + 1, total + 1):
            self.progress.raise_if_stopping()
            with context.stops.step(), context.profiler.step(step, last=step == total):
                self.rl_step.run(step)

    def _build_optimizer(self) -> Optimizer:
        config = self.context.config
        updates = config.trainer.steps * config.batching.minibatches
        return Optimizer(self.learner.policy, config.optimizer, updates)

    # ------------------------------------------------------------------ the end

    @contextmanager
    def _profiled(self) -> Iterator[None]:
        """Tell the profile at the end, or when the run was asked to stop."""
        try:
            yield
        except RunStopped:
            self._tell_profile()
            raise
        self._tell_profile()

    def _tell_profile(self) -> None:
        told = self.context.profiler.finish()
        if told is not None:
            self.context.say(told)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Save first where the run stands, whatever ends it early."""
        progress = self.progress
        try:
            yield
        except (Stopping, RewardError) as end:
            path = progress.save()
            progress.finish_save()
            # A signal to a whole job ends the scoring processes, too.
            reason = self.context.stops.agreed()
            if reason is None:
                raise
            position = progress.position
            step = position.step if position.phase == "rl" else 0
            raise RunStopped(reason, step, path) from end
        except NonFiniteError:
            progress.finish_save()
            raise
