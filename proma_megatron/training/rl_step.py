"""One RL step, top to bottom: from a step's prompts to the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from proma_megatron.advantages.registry import advantages
from proma_megatron.config.sections import normalizes_std
from proma_megatron.learner.divergences import Divergences, due
from proma_megatron.learner.learner import Learner
from proma_megatron.learner.references import Batch, ReferencePolicies
from proma_megatron.learner.snapshots import WeightSnapshot
from proma_megatron.projection.fp8_gate import warning
from proma_megatron.rollout.groups import first_samples
from proma_megatron.training.collect import Collector
from proma_megatron.training.context import StepContext
from proma_megatron.training.progress import Progress
from proma_megatron.training.validation import Validation
from proma_megatron.types import RolloutGroup, StepReport, TrainingSequence


class RLStep:
    """An RL step, made again and again. Every rank has one.

    What a stop, a failure or a crash interrupts is dropped and done again; a step whose weights are
    updated already only lacks its validation, and the run's position says so.
    """

    def __init__(
        self,
        context: StepContext,
        progress: Progress,
        collector: Collector,
        references: ReferencePolicies,
        divergences: Divergences,
        learner: Learner,
        validation: Validation,
    ) -> None:
        self.context, self.progress = context, progress
        self.collector, self.references, self.divergences = collector, references, divergences
        self.learner, self.validation = learner, validation

    def run(self, step: int) -> None:
        """Make this step, report it, and save the checkpoint if one is due.

        Raises:
            RewardError: the reward function failed; the step's rollouts are written down.
            NonFiniteError: too many steps in a row made no update.
            Stopping: the run is to stop.
        """
        context, progress = self.context, self.progress
        context.phases.step = step
        with context.phase("step"):
            groups, metrics = self.collector.collect(step, progress.raise_if_stopping)
            batch = [_sequences(group) for group in groups]
            if self.references.needed:
                with context.phase("reference"):
                    batch, measured = self.references.attach(batch, self._initial)
                    metrics |= measured
            batch = self._with_advantages(groups, batch)
            progress.raise_if_stopping()  # from here on there is no way back
            if self.divergences.lagged is not None:
                with context.phase("kl_lagged"):
                    joined = progress.in_lagged_mean
                    metrics |= self.divergences.to_lagged(step, batch, joined=joined)
                    progress.in_lagged_mean = True
            with context.phase("train"):
                metrics |= self._train(step, batch)
            if self.divergences.looks_back(step):
                with context.phase("kl"):
                    metrics |= self.divergences.after_step(step, batch)
            if not progress.skipped_in_a_row:
                self.references.adapt(metrics)
        self._count_tokens(metrics)
        metrics |= context.stopwatch.seconds()
        samples = first_samples(groups, context.config.trainer.log_samples)
        self.conclude(StepReport(step, metrics, samples))

    def conclude(self, report: StepReport) -> None:
        """Validate if it is due, report the step, save if that is due."""
        context, progress = self.context, self.progress
        step, trainer, metrics = report.step, context.config.trainer, dict(report.metrics)
        score = None
        if due(step, trainer.eval_every, trainer.steps):
            progress.move_to("rl", step, pending=report)
            with context.phase("step"), context.phase("validation"):
                found = self.validation.run(step)
            metrics |= found
            score = found["validation/accuracy"]
        self._add_seconds(metrics)
        context.reporter.write(StepReport(step, metrics, report.samples), "rl")
        progress.move_to("rl", step)
        progress.stop_at_trouble()
        better = trainer.keep_best > 0 and score is not None and score > progress.best
        progress.best = max(progress.best, -1.0 if score is None else score)
        regular = trainer.save_every > 0 and step % trainer.save_every == 0
        if better or (regular and not progress.skipped_in_a_row) or step == trainer.steps:
            progress.save(score=score)

    def validate_first(self) -> None:
        """Report the accuracy that RL begins with."""
        with self.context.phase("validation"):
            metrics = self.validation.run(0)
        self.context.stopwatch.seconds()
        self.context.reporter.write(StepReport(0, metrics), "rl")

    def _with_advantages(self, groups: Sequence[RolloutGroup], batch: Batch) -> Batch:
        """Return the batch with its advantages, from rewards and the penalties on them."""
        config, penalties = self.context.config, self.references.penalties(batch)
        rewards = [
            [scored.reward - lost for scored, lost in zip(group.samples, losses, strict=True)]
            for group, losses in zip(groups, penalties, strict=True)
        ]
        values = advantages(groups, rewards, config.advantage, normalizes_std(config))
        return [
            [replace(s, advantage=value) for s, value in zip(sequences, of_group, strict=True)]
            for sequences, of_group in zip(batch, values, strict=True)
        ]

    def _train(self, step: int, batch: Batch) -> dict[str, float]:
        """Update the policy by these sequences, and tell what the user should know of it."""
        progress, config = self.progress, self.context.config
        assert progress.optimizer is not None
        accumulator = self.learner.accumulator
        gate = accumulator.gate if accumulator is not None else None
        compares = gate is not None and gate.due(step)
        metrics = self.learner.update(
            batch, progress.optimizer, self.references.in_loss, compares=compares
        )
        if self.learner.fp8 is not None:
            problem = warning(self.learner.fp8, config.projection)
            if problem is not None:
                self.context.say(f"step {step}: {problem}")
        updates, offences = config.batching.minibatches, self.learner.offences
        progress.count_skipped("rl", step, metrics, offences, updates)
        removes = accumulator is not None and not config.projection.acts_alone
        looked = removes and not metrics["optimizer/skipped"]
        if looked and "projection/removed_energy" not in metrics:
            self.context.say(
                "nothing was projected: each replica's minibatch fits into one microbatch; "
                "lower batching.tokens_per_microbatch"
            )
        return metrics

    def _count_tokens(self, metrics: Mapping[str, float]) -> None:
        """Tell the profile what this step has sampled, also in rounds whose groups it left out."""
        rollout, profiler = self.context.config.rollout, self.context.profiler
        sampled = metrics.get("rollout/rounds", 1.0) * rollout.prompts_per_step
        sampled *= rollout.samples_per_prompt * metrics["rollout/length"]
        profiler.count("rollout", round(sampled))
        profiler.count("train", round(metrics["tokens/trained"]))

    def _add_seconds(self, metrics: dict[str, float]) -> None:
        """Add what phases took since the last row, and the rates that follow."""
        for name, seconds in self.context.stopwatch.seconds().items():
            metrics[name] = metrics.get(name, 0.0) + seconds
        whole = metrics["seconds/step"]
        metrics["tokens/second"] = metrics["tokens/trained"] / whole
        if "seconds/save" in metrics:  # what saves since the last row have cost
            metrics["save/share"] = metrics["seconds/save"] / (whole + metrics["seconds/save"])

    @property
    def _initial(self) -> WeightSnapshot:
        assert self.divergences.initial is not None, "the run takes the snapshot"
        return self.divergences.initial


def _sequences(group: RolloutGroup) -> list[TrainingSequence]:
    """Return a group's rollouts as training sequences, whose advantages are still to come."""
    prompt = group.prompt.tokens
    return [
        TrainingSequence(
            tokens=(*prompt, *scored.rollout.tokens),
            loss_mask=(0,) * len(prompt) + (1,) * len(scored.rollout.tokens),
            advantage=0.0,
            old_logprobs=(0.0,) * len(prompt) + scored.rollout.logprobs,
        )
        for scored in group.samples
    ]
