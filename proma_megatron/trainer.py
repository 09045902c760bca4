"""The run: a supervised warm start, then RL steps. `Trainer.step` is one RL step, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Sequence

from proma_megatron.batching.advantages import group_relative
from proma_megatron.batching.packing import (
    consecutive_microbatches,
    loss_tokens,
    pack,
    plan_microbatches,
)
from proma_megatron.checkpoint import (
    WeightSnapshot,
    load_checkpoint,
    load_pretrained,
    save_checkpoint,
)
from proma_megatron.config import RunConfig
from proma_megatron.evaluation.evaluate import evaluate
from proma_megatron.metrics import Stopwatch, write_rows
from proma_megatron.output import complete_or_absent
from proma_megatron.policy.losses import LossOptions
from proma_megatron.policy.model import build_policy
from proma_megatron.policy.optimizer import Optimizer
from proma_megatron.policy.schedule import Sums, evaluate_logprobs, forward_backward, kl_estimate
from proma_megatron.projection import diagnostics
from proma_megatron.projection.accumulator import Accumulator
from proma_megatron.projection.diagnostics import Units
from proma_megatron.records import (
    Microbatch,
    Prompt,
    Rollout,
    RolloutGroup,
    StepReport,
    TrainingSequence,
)
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
from proma_megatron.topology import Topology


class Trainer:
    """One run on this rank. Every rank of the layout builds one and calls `run`."""

    def __init__(
        self,
        config: RunConfig,
        data: Data,
        topology: Topology,
        run_dir: RunDir,
        reporter: Reporter,
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
        self.loss = self._choose_loss()
        self.optimizer: Optimizer | None = None  # built once RL's first weights are there
        self.stopwatch = Stopwatch()
        self.done = 0  # RL steps that the weights have seen
        self.prompts_seen = data.train.state()  # the stream's position after those
        self.initial: WeightSnapshot | None = None  # the policy that RL starts from
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

    def _choose_loss(self) -> LossOptions:
        options = self.config.loss
        split = self.config.batching.minibatches > 1
        importance = options.importance == "on" or (options.importance == "auto" and split)
        if self.config.algorithm == "grpo":
            return LossOptions("grpo", clip_low=options.clip_low, clip_high=options.clip_high)
        return LossOptions("unit" if self.accumulator else "reinforce", importance=importance)

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
        if self.initial is None:
            self.initial = WeightSnapshot(self.policy)
        total, every = self.config.trainer.steps, self.config.trainer.save_every
        self.reporter.start("rl", total, completed=self.done)
        try:
            if self.done == 0:
                self.reporter.write(StepReport(0, self.validate(0)), "rl")
            for step in range(self.done + 1, total + 1):
                self.reporter.write(self.step(step), "rl")
                if step == total or (every and step % every == 0):
                    self._save()
        except RewardError:
            self._save()
            raise

    def step(self, step: int) -> StepReport:
        """One RL step: its metrics, and a few of its rollouts."""
        with self.stopwatch.phase("step"):
            prompts = self.data.train.take(self.config.rollout.prompts_per_step)
            with self.stopwatch.phase("rollout"):
                rollouts = self._generate(prompts, step)
            with self.stopwatch.phase("score"):
                groups = self._score(rollouts, step)
            sequences = [self._sequences(found) for found in groups]
            metrics = describe(groups)
            with self.stopwatch.phase("train"):
                metrics |= self._train(sequences)
            self.done, self.prompts_seen = step, self.data.train.state()
            if self._due(step, self.config.trainer.kl_every):
                with self.stopwatch.phase("kl"):
                    metrics["policy/kl_initial"] = self._kl_to_initial(sequences)
            if self._due(step, self.config.trainer.eval_every):
                with self.stopwatch.phase("validation"):
                    metrics |= self._validate_after(step, metrics, groups)
        metrics |= self.stopwatch.seconds()
        metrics["tokens/second"] = metrics["tokens/trained"] / metrics["seconds/step"]
        return StepReport(step, metrics, samples_of(groups, self.config.trainer.log_samples))

    def _due(self, step: int, every: int) -> bool:
        return step == self.config.trainer.steps or (every > 0 and step % every == 0)

    def close(self) -> None:
        """End the scoring processes."""
        self.scorer.close()

    # ------------------------------------------------------------------ rollouts

    def _generate(self, prompts: Sequence[Prompt], step: int) -> list[Rollout]:
        """Rollouts of this replica's share of the prompts."""
        return sample_rollouts(
            self.policy,
            self.data.tokenizer,
            share(prompts, self.topology),
            self.config.rollout.samples_per_prompt,
            self.sampling,
            seed=self.config.seed,
            step=step,
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

    def _sequences(self, found: RolloutGroup) -> list[TrainingSequence]:
        """A group's rollouts as training sequences with their advantages."""
        advantages = group_relative(
            [scored.reward for scored in found.samples], self.config.advantage.normalize_std
        )
        sequences = []
        for scored, advantage in zip(found.samples, advantages, strict=True):
            rollout = scored.rollout
            prompt = found.prompt.tokens
            sequences.append(
                TrainingSequence(
                    tokens=(*prompt, *rollout.tokens),
                    loss_mask=(0,) * len(prompt) + (1,) * len(rollout.tokens),
                    advantage=advantage,
                    old_logprobs=(0.0,) * len(prompt) + rollout.logprobs,
                )
            )
        return sequences

    def _train(self, groups: Sequence[Sequence[TrainingSequence]]) -> dict[str, float]:
        """One optimizer step per minibatch of groups."""
        count = self.config.batching.minibatches
        size = len(groups) // count
        metrics: dict[str, float] = {}
        units: Units = {}
        sums = Sums()
        trained = 0
        assert self.optimizer is not None
        for index in range(count):
            minibatch = [s for found in groups[index * size : (index + 1) * size] for s in found]
            sums = self._accumulate(minibatch, self.loss, self.accumulator)
            update = self.optimizer.step()
            if self.accumulator is not None:
                mine = self.accumulator.tally.units()
                units = diagnostics.merge([units, diagnostics.gather(mine, self.topology)])
            trained += sum(len(sequence.tokens) for sequence in minibatch)
            if index == 0:  # still the policy that the rollouts came from
                metrics |= {
                    "policy/entropy": sums.entropy / sums.tokens,
                    "policy/logprob_mismatch": sums.mismatch / sums.tokens,
                    "policy/logprob_mismatch_max": sums.worst_mismatch,
                }
            metrics |= update
        if self.accumulator is not None and not units:
            self.reporter.message(
                "nothing was projected: each replica's minibatch fits into one microbatch; "
                "lower batching.tokens_per_microbatch"
            )
        metrics["policy/kl_rollout"] = sums.kl / sums.tokens
        metrics["loss/policy"] = -sums.objective / sums.tokens
        metrics["tokens/trained"] = float(trained)
        return metrics | diagnostics.metrics(units)

    def _accumulate(
        self,
        sequences: Sequence[TrainingSequence],
        loss: LossOptions,
        accumulator: Accumulator | None,
        temperature: float | None = None,
    ) -> Sums:
        """Gradients of these sequences, given to all replicas; sums over all replicas."""
        microbatches = self._pack(sequences)
        sums = forward_backward(
            self.policy,
            microbatches,
            loss,
            accumulator=accumulator,
            temperature=temperature or self.config.rollout.temperature,
        )
        return sum(self.topology.gather_over_data(sums), start=Sums())

    def _pack(self, sequences: Sequence[TrainingSequence]) -> list[Microbatch]:
        """This replica's microbatches; the denominator counts all replicas."""
        topology = self.topology
        size = self.config.batching.sequences_per_microbatch
        multiple = topology.pipeline.size if topology.virtual_pipeline > 1 else 1
        if size is not None:
            plan = consecutive_microbatches(len(sequences), size, topology.data.size, multiple)
        else:
            plan = plan_microbatches(
                [len(sequence.tokens) for sequence in sequences],
                self.config.batching.tokens_per_microbatch,
                topology.data.size,
                multiple,
            )
        denominator = float(loss_tokens(sequences))
        return [
            pack(
                [sequences[at] for at in members],
                index,
                denominator,
                topology.device,
                topology.tensor.size if topology.sequence_parallel else 1,
            )
            for index, members in enumerate(plan[topology.data.rank])
        ]

    def _kl_to_initial(self, groups: Sequence[Sequence[TrainingSequence]]) -> float:
        """KL(rollout policy, initial policy) per token: the k3 estimate on this step's rollouts."""
        assert self.initial is not None
        microbatches = self._pack([sequence for found in groups for sequence in found])
        with self.initial:
            logprobs = evaluate_logprobs(self.policy, microbatches, self.config.rollout.temperature)
        value = None
        if logprobs is not None:
            total, count = 0.0, 0.0
            for microbatch, initial in zip(microbatches, logprobs, strict=True):
                mask = microbatch.loss_mask > 0
                total += kl_estimate(initial[mask], microbatch.old_logprobs[mask])
                count += float(mask.sum())
            value = (total, count)
        shares = self.topology.gather_over_data(self.topology.from_last_stage(value))
        return sum(total for total, _ in shares) / sum(count for _, count in shares)

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
            sums = self._accumulate(
                demonstrations.take(warm.sequences_per_step),
                LossOptions("supervised"),
                accumulator=None,
                temperature=1.0,
            )
            metrics = {"loss/supervised": sums.surprise / sums.tokens, **optimizer.step()}
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
        save_checkpoint(
            path,
            self.policy,
            self.optimizer if self.done else None,  # before its first step, Adam has no state
            {"step": self.done, "prompts": self.prompts_seen},
        )
        self.reporter.message(f"saved {path}")

    def _resume(self) -> None:
        """Load the newest checkpoint and the policy that RL started from."""
        newest, first = self.run_dir.latest_checkpoint(), self.run_dir.checkpoint(0)
        assert newest is not None, "prepare_run_dir refuses to resume without a checkpoint"
        load_checkpoint(first, self.policy, None)
        self.initial = WeightSnapshot(self.policy)
        self.optimizer = self._build_optimizer()
        state = load_checkpoint(newest, self.policy, None if newest == first else self.optimizer)
        self.data.train.restore(state["prompts"])
        self.prompts_seen = self.data.train.state()
        self.done = int(state["step"])
