"""The supervised warm start: steps on worked answers before RL, with an optimizer of their own."""

from __future__ import annotations

import time

from proma_megatron.data.demonstrations import Demonstrations
from proma_megatron.learner.learner import Learner
from proma_megatron.learner.optimizer import Optimizer
from proma_megatron.training.context import StepContext
from proma_megatron.training.progress import Progress
from proma_megatron.types import StepReport


class WarmStart:
    """Training of the policy on demonstrations. Every rank has one."""

    def __init__(
        self,
        context: StepContext,
        progress: Progress,
        learner: Learner,
        demonstrations: Demonstrations,
    ) -> None:
        self.context, self.progress = context, progress
        self.learner, self.demonstrations = learner, demonstrations

    def build_optimizer(self) -> Optimizer | None:
        """Return an optimizer of the warm start's schedule; None if it has no steps."""
        config = self.context.config
        warm = config.warm_start
        if not warm.steps:
            return None
        schedule = config.optimizer.model_copy(
            update={
                "lr": warm.lr,
                "min_lr": min(warm.lr, config.optimizer.min_lr),
                "warmup_steps": warm.warmup_steps,
                "decay": warm.decay,
            }
        )
        return Optimizer(self.learner.policy, schedule, warm.steps)

    def run(self) -> None:
        """Make the steps that are still to come, and the checkpoints that are due.

        Raises:
            NonFiniteError: too many steps in a row made no update.
            Stopping: the run is to stop.
        """
        context, progress = self.context, self.progress
        warm, every = context.config.warm_start, context.config.trainer.save_every
        if not warm.steps:
            return
        optimizer = progress.optimizer
        assert optimizer is not None, "the run builds it"
        done = progress.position.step
        context.reporter.start("warm_start", warm.steps, completed=done)
        for step in range(done + 1, warm.steps + 1):
            progress.raise_if_stopping()
            started, context.phases.step = time.perf_counter(), step
            with context.stops.step(), context.phase("warm_start"):
                sequences = self.demonstrations.take(warm.sequences_per_step)
                metrics = self.learner.supervise(sequences, optimizer)
            context.profiler.count("warm_start", sum(len(s.tokens) for s in sequences))
            context.stopwatch.seconds()
            metrics["seconds/step"] = time.perf_counter() - started
            progress.count_skipped("warm_start", step, metrics, self.learner.offences)
            context.reporter.write(StepReport(step, metrics), "warm_start")
            progress.move_to("warm_start", step)
            progress.stop_at_trouble()
            if every and step % every == 0 and step < warm.steps:
                progress.save()
