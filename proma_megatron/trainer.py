"""The run: a supervised warm start, then RL steps. `Trainer.step` is one RL step, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from proma_megatron.algorithms import normalizes_std
from proma_megatron.batching.advantages.estimate import advantages
from proma_megatron.batching.selection import choose, informative
from proma_megatron.checkpoint import load_checkpoint, load_pretrained, save_checkpoint
from proma_megatron.config import RunConfig
from proma_megatron.evaluation.evaluate import evaluate
from proma_megatron.learner import Learner
from proma_megatron.metrics import Stopwatch, write_rows
from proma_megatron.output import complete_or_absent
from proma_megatron.policy.model import build_policy
from proma_megatron.policy.optimizer import Optimizer
from proma_megatron.projection.accumulator import Accumulator
from proma_megatron.records import (
    Prompt,
    Rollout,
    RolloutGroup,
    StepReport,
    TrainingSequence,
)
from proma_megatron.references import Batch, Divergences, References, due
from proma_megatron.reporting import Reporter
from proma_megatron.rollout.collect import (
    describe,
    group,
    sample_rollouts,
    samples_of,
    score_rollouts,
    share,
)
from proma_megatron.rollout.demonstrations import Demonstrations
from proma_megatron.rollout.generator import SamplingOptions
from proma_megatron.rollout.rewards import RewardError
from proma_megatron.rollout.scoring import Scorer
from proma_megatron.rollout.source import Data
from proma_megatron.run_dir import MARKER, RunDir
from proma_megatron.snapshots import WeightSnapshot
from proma_megatron.stopping import Stops, StopSignals
from proma_megatron.topology import Topology
from proma_megatron.watchdog import Phases


class Trainer:
    """One run on this rank. Every rank of the layout builds one and calls `run`."""

    def __init__(
        self,
        config: RunConfig,
        data: Data,
        topology: Topology,
        run_dir: RunDir,
        reporter: Reporter,
        phases: Phases | None = None,
        stops: Stops | None = None,
    ) -> None:
        self.config, self.data, self.topology = config, data, topology
        self.run_dir, self.reporter = run_dir, reporter
        self.scorer = Scorer(config.reward, config.rollout.max_new_tokens)
        self.policy = build_policy(
            config.model,
            config.model.vocab_size or data.tokenizer.vocab_size,
            config.max_sequence_length,
            topology,
            seed=config.seed if config.model.path is None else None,
            distributed_optimizer=config.optimizer.distributed,
        )
        self.accumulator = self._build_accumulator()
        self.learner = Learner(config, self.policy, self.accumulator)
        self.references = References(config, self.learner)
        self.divergences = Divergences(config, self.learner, self.references.needs_step)
        self.optimizer: Optimizer | None = None  # built once RL's first weights are there
        self.phases = phases or Phases()
        self.stops = stops or Stops(topology, StopSignals(), None, 0.0)
        self.stopwatch = Stopwatch(watch=self.phases.phase)
        self.done = 0  # RL steps that the weights have seen
        self.prompts_seen = data.train.state()  # the stream's position after those
        rollout = config.rollout
        self.sampling = SamplingOptions(
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            max_new_tokens=rollout.max_new_tokens,
            batch_size=rollout.batch_size,
        )

    def _build_accumulator(self) -> Accumulator | None:
        if not self.config.projects:
            return None
        return Accumulator(
            self.policy.modules,
            self.policy.shards,
            self.config.projection,
            self.topology,
            tied=self.config.model.tie_embeddings,
        )

    # ------------------------------------------------------------------ the run

    def run(self, resume: bool = False) -> None:
        """Warm start and RL to the end, or from the newest checkpoint.

        Raises:
            RewardError: the reward function failed; the policy and the rollouts are saved first.
        """
        if resume:
            self._resume()
        else:
            if self.config.model.path is not None:
                load_pretrained(self.config, self.policy)
                self.reporter.message(f"loaded the weights of {self.config.model.path}")
            self._warm_start()
            self.optimizer = self._build_optimizer()
            self._save()
        if self.divergences.initial is None:
            self.divergences.initial = WeightSnapshot(self.policy)
        total, every = self.config.trainer.steps, self.config.trainer.save_every
        if not total:
            return  # only the policy that RL would start from was asked for
        self.reporter.start("rl", total, completed=self.done)
        self.phases.step = self.done
        try:
            if self.done == 0:
                with self.phases.phase("validation"):
                    metrics = self.validate(0)
                self.reporter.write(StepReport(0, metrics), "rl")
            for step in range(self.done + 1, total + 1):
                self.reporter.write(self.step(step), "rl")
                if step == total or (every and step % every == 0):
                    self._save()
        except RewardError:
            self._save()
            raise

    def step(self, step: int) -> StepReport:
        """One RL step: its metrics, and a few of its rollouts."""
        self.phases.step = step
        with self.stopwatch.phase("step"):
            groups, metrics = self._collect(step)
            batch = [_sequences(found) for found in groups]
            if self.references.needed:
                with self.stopwatch.phase("reference"):
                    batch, found = self.references.attach(batch, self._initial)
                    metrics |= found
            batch = self._judge(groups, batch)
            if self.divergences.lagged is not None:
                with self.stopwatch.phase("kl_lagged"):
                    metrics |= self.divergences.to_lagged(step, batch)
            with self.stopwatch.phase("train"):
                metrics |= self._train(batch)
            self.done, self.prompts_seen = step, self.data.train.state()
            if self.divergences.looks_back(step):
                with self.stopwatch.phase("kl"):
                    metrics |= self.divergences.after_step(step, batch)
            self.references.adapt(metrics)
            if due(step, self.config.trainer.eval_every, self.config.trainer.steps):
                with self.stopwatch.phase("validation"):
                    metrics |= self._validate_after(step, metrics, groups)
        metrics |= self.stopwatch.seconds()
        metrics["tokens/second"] = metrics["tokens/trained"] / metrics["seconds/step"]
        return StepReport(step, metrics, samples_of(groups, self.config.trainer.log_samples))

    @property
    def _initial(self) -> WeightSnapshot:
        assert self.divergences.initial is not None, "run takes the snapshot"
        return self.divergences.initial

    def close(self) -> None:
        """End the scoring processes."""
        self.scorer.close()

    # ------------------------------------------------------------------ rollouts

    def _collect(self, step: int) -> tuple[list[RolloutGroup], dict[str, float]]:
        """Scored groups of the step, as many as it has prompts, and what they were like.

        With ``rollout.resampling_rounds`` groups whose rewards are all equal, which teach nothing,
        are replaced by those of further prompts while rounds last; the metrics are of everything
        that was sampled.
        """
        wanted, sampled, found = self.config.rollout.prompts_per_step, [], 0
        for taken in range(1 + self.config.rollout.resampling_rounds):
            prompts = self.data.train.take(wanted)
            with self.stopwatch.phase("rollout"):
                rollouts = self._generate(prompts, step, first=taken * wanted)
            with self.stopwatch.phase("score"):
                sampled += self._score(rollouts, step)
            found = len(informative(sampled))
            if found >= wanted:
                break
        metrics = describe(sampled)
        if self.config.rollout.resampling_rounds:
            metrics["rollout/rounds"] = len(sampled) / wanted
            metrics["rollout/informative"] = min(found, wanted) / wanted
        return choose(sampled, wanted), metrics

    def _generate(self, prompts: Sequence[Prompt], step: int, first: int) -> list[Rollout]:
        """Rollouts of this replica's share of the prompts."""
        return sample_rollouts(
            self.policy,
            self.data.tokenizer,
            share(prompts, self.topology),
            self.config.rollout.samples_per_prompt,
            self.sampling,
            seed=self.config.seed,
            step=step,
            first=first,
        )

    def _score(self, rollouts: list[Rollout], step: int) -> list[RolloutGroup]:
        """Scored groups of all replicas, in the order of the prompts, on every rank."""
        try:
            scored = score_rollouts(self.topology, rollouts, self.scorer)
        except RewardError:
            self._keep_unscored(rollouts, step)
            raise
        groups = group(scored, self.config.rollout.samples_per_prompt)
        shares = self.topology.gather_over_data(groups)
        return [found for place in zip(*shares, strict=True) for found in place]

    def _keep_unscored(self, rollouts: list[Rollout], step: int) -> None:
        """Write the rollouts that a failed reward function would lose."""
        everything = [r for part in self.topology.gather_over_data(rollouts) for r in part]
        if self.topology.is_main:
            rows = (
                {
                    "problem": rollout.prompt.problem.id,
                    "sample": rollout.sample,
                    "prompt": rollout.prompt.text,
                    "completion": rollout.text,
                    "answer": rollout.prompt.problem.answer,
                }
                for rollout in everything
            )
            write_rows(self.run_dir.unscored(step), rows)

    def validate(self, step: int) -> dict[str, float]:
        """Accuracy and its kin on the validation split; every completion goes to the disk."""
        found = evaluate(
            self.policy,
            self.data.tokenizer,
            self.data.validation,
            self.config,
            self.scorer,
            step=step,
        )
        if self.topology.is_main:
            with complete_or_absent(self.run_dir.evaluation(step)) as part:
                write_rows(part, found.rows())
        return {f"validation/{name}": value for name, value in found.metrics().items()}

    def _validate_after(
        self, step: int, metrics: dict[str, float], groups: Sequence[RolloutGroup]
    ) -> dict[str, float]:
        """Validation of the updated policy; if its rewards fail, the step's record is kept."""
        try:
            return self.validate(step)
        except RewardError:
            samples = samples_of(groups, self.config.trainer.log_samples)
            self.reporter.write(StepReport(step, metrics, samples), "rl")
            raise

    # ------------------------------------------------------------------ training

    def _judge(self, groups: Sequence[RolloutGroup], batch: Batch) -> Batch:
        """The batch with its advantages."""
        penalties = self.references.penalties(batch)
        rewards = [
            [scored.reward - lost for scored, lost in zip(found.samples, losses, strict=True)]
            for found, losses in zip(groups, penalties, strict=True)
        ]
        values = advantages(groups, rewards, self.config.advantage, normalizes_std(self.config))
        return [
            [replace(s, advantage=value) for s, value in zip(found, of_group, strict=True)]
            for found, of_group in zip(batch, values, strict=True)
        ]

    def _train(self, batch: Batch) -> dict[str, float]:
        assert self.optimizer is not None
        metrics = self.learner.update(batch, self.optimizer, self.references.in_loss)
        removes = self.accumulator is not None and not self.config.projection.acts_alone
        if removes and "projection/removed_energy" not in metrics:
            self.reporter.message(
                "nothing was projected: each replica's minibatch fits into one microbatch; "
                "lower batching.tokens_per_microbatch"
            )
        return metrics

    def _warm_start(self) -> None:
        """Supervised steps on worked answers, with an optimizer of their own."""
        warm = self.config.warm_start
        if not warm.steps:
            return
        schedule = self.config.optimizer.model_copy(
            update={
                "lr": warm.lr,
                "min_lr": min(warm.lr, self.config.optimizer.min_lr),
                "warmup_steps": warm.warmup_steps,
                "decay": warm.decay,
            }
        )
        optimizer = Optimizer(self.policy, schedule, warm.steps)
        demonstrations = Demonstrations(
            self.data.supervised, self.data.tokenizer, warm.guesses, self.config.seed
        )
        self.reporter.start("warm_start", warm.steps)
        for step in range(1, warm.steps + 1):
            started = time.perf_counter()
            self.phases.step = step
            with self.phases.phase("warm_start"):
                batch = demonstrations.take(warm.sequences_per_step)
                metrics = self.learner.supervise(batch, optimizer)
            metrics["seconds/step"] = time.perf_counter() - started
            self.reporter.write(StepReport(step, metrics), "warm_start")

    # ------------------------------------------------------------------ checkpoints

    def _build_optimizer(self) -> Optimizer:
        updates = self.config.trainer.steps * self.config.batching.minibatches
        return Optimizer(self.policy, self.config.optimizer, updates)

    def _save(self) -> None:
        path = self.run_dir.checkpoint(self.done)
        if (path / MARKER).exists():
            return  # of this very step; writing it again would only put it at risk
        state: dict[str, Any] = {
            "step": self.done,
            "prompts": self.prompts_seen,
            "kl_coefficient": self.references.coefficient,
        }
        lagged = self.divergences.lagged
        if lagged is not None and lagged.count:
            with lagged.in_place():
                mean = self.run_dir.lagged_of(path)
                save_checkpoint(mean, self.policy, None, {"count": lagged.count})
        save_checkpoint(
            path,
            self.policy,
            self.optimizer if self.done else None,  # before its first step, Adam has no state
            state,
        )
        self.reporter.message(f"saved {path}")

    def _resume(self) -> None:
        """Load the newest checkpoint and the policy that RL started from."""
        newest, first = self.run_dir.latest_checkpoint(), self.run_dir.checkpoint(0)
        assert newest is not None, "prepare_run_dir refuses to resume without a checkpoint"
        load_checkpoint(first, self.policy, None)
        self.divergences.initial = WeightSnapshot(self.policy)
        lagged = self.divergences.lagged
        mean = self.run_dir.lagged_of(newest)
        if lagged is not None and (mean / MARKER).is_file():
            lagged.restore(load_checkpoint(mean, self.policy, None)["count"])
        self.optimizer = self._build_optimizer()
        state = load_checkpoint(newest, self.policy, None if newest == first else self.optimizer)
        self.data.train.restore(state["prompts"])
        self.prompts_seen = self.data.train.state()
        self.done = int(state["step"])
        if self.config.loss.kl.target is not None:
            self.references.coefficient = state.get("kl_coefficient", self.references.coefficient)


def _sequences(found: RolloutGroup) -> list[TrainingSequence]:
    """A group's rollouts as training sequences, whose advantages are still to come."""
    prompt = found.prompt.tokens
    return [
        TrainingSequence(
            tokens=(*prompt, *scored.rollout.tokens),
            loss_mask=(0,) * len(prompt) + (1,) * len(scored.rollout.tokens),
            advantage=0.0,
            old_logprobs=(0.0,) * len(prompt) + scored.rollout.logprobs,
        )
        for scored in found.samples
    ]
