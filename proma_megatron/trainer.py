"""The run: a supervised warm start, then RL steps. `Trainer.step` is one RL step, top to bottom."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

import torch

from proma_megatron.batching.advantages import group_relative
from proma_megatron.batching.packing import loss_tokens, pack, plan_microbatches
from proma_megatron.checkpoint import (
    WeightSnapshot,
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from proma_megatron.config import ConfigError, RunConfig
from proma_megatron.metrics import Stopwatch
from proma_megatron.policy.losses import LossOptions
from proma_megatron.policy.model import build_policy
from proma_megatron.policy.optimizer import Optimizer
from proma_megatron.policy.schedule import Sums, evaluate_logprobs, forward_backward
from proma_megatron.projection.accumulator import Accumulator
from proma_megatron.projection.diagnostics import Tally
from proma_megatron.records import Microbatch, Prompt, RolloutGroup, StepReport, TrainingSequence
from proma_megatron.reporting import Reporter
from proma_megatron.rollout.collect import group, sample_rollouts, score_rollouts
from proma_megatron.rollout.generator import SamplingOptions
from proma_megatron.rollout.rewards import RewardError, load_reward
from proma_megatron.rollout.source import Data
from proma_megatron.run_dir import RunDir
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
        self.reward = load_reward(config.reward.function)
        self.policy = build_policy(
            config.model,
            data.tokenizer.vocab_size,
            config.max_sequence_length,
            topology,
            seed=config.seed,
            distributed_optimizer=config.optimizer.distributed,
        )
        self.accumulator = self._build_accumulator()
        self.loss = self._choose_loss()
        self.optimizer = Optimizer(
            self.policy, config.optimizer, config.trainer.steps * config.batching.minibatches
        )
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
            ConfigError: nothing to resume from.
            RewardError: the reward function failed; the policy and the rollouts are saved first.
        """
        if resume:
            self._resume()
        else:
            self._warm_start()
            self._save()
        if self.initial is None:
            self.initial = WeightSnapshot(self.policy)
        total, every = self.config.trainer.steps, self.config.trainer.save_every
        self.reporter.start("rl", total, completed=self.done)
        try:
            if self.done == 0:
                self.reporter.message(f"validation before RL: {self.validate():.3f}")
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
            metrics = self._describe(groups)
            with self.stopwatch.phase("train"):
                metrics |= self._train(sequences)
            self.done, self.prompts_seen = step, self.data.train.state()
            if self._due(step, self.config.trainer.kl_every):
                with self.stopwatch.phase("kl"):
                    metrics["policy/kl_initial"] = self._kl_to_initial(sequences)
            if self._due(step, self.config.trainer.validate_every):
                with self.stopwatch.phase("validation"):
                    metrics["validation/accuracy"] = self.validate()
        metrics |= self.stopwatch.seconds()
        metrics["tokens/second"] = metrics["tokens/trained"] / metrics["seconds/step"]
        return StepReport(step, metrics, self._samples(groups, step))

    def _due(self, step: int, every: int) -> bool:
        return step == self.config.trainer.steps or (every > 0 and step % every == 0)

    # ------------------------------------------------------------------ rollouts

    def _generate(self, prompts: Sequence[Prompt], step: int) -> list[Any]:
        """Rollouts of this replica's share of the prompts."""
        mine = list(prompts)[self.topology.data.rank :: self.topology.data.size]
        return sample_rollouts(
            self.policy,
            self.data.tokenizer,
            mine,
            self.config.rollout.samples_per_prompt,
            self.sampling,
            seed=self.config.seed,
            step=step,
        )

    def _score(self, rollouts: list[Any], step: int) -> list[RolloutGroup]:
        """Scored groups of all replicas, in the order of the prompts, on every rank."""
        try:
            scored = score_rollouts(self.policy, rollouts, self.reward)
        except RewardError:
            self._keep_unscored(rollouts, step)
            raise
        groups = group(scored, self.config.rollout.samples_per_prompt)
        shares = self.topology.gather_over_data(groups)
        return [share[at] for at in range(len(groups)) for share in shares]

    def _keep_unscored(self, rollouts: list[Any], step: int) -> None:
        """Write the rollouts that a failed reward function would lose."""
        everything = [r for share in self.topology.gather_over_data(rollouts) for r in share]
        if self.topology.is_main:
            path = self.run_dir.path / f"unscored_step_{step:06d}.jsonl"
            with path.open("w") as file:
                for rollout in everything:
                    row = {
                        "problem": rollout.prompt.problem.id,
                        "sample": rollout.sample,
                        "prompt": rollout.prompt.text,
                        "completion": rollout.text,
                        "answer": rollout.prompt.problem.answer,
                    }
                    file.write(json.dumps(row) + "\n")

    def validate(self) -> float:
        """Mean reward of greedy completions over the validation split."""
        count = self.config.data.validation_problems
        prompts = self.data.validation.all()[:count]
        mine = prompts[self.topology.data.rank :: self.topology.data.size]
        greedy = dataclasses.replace(self.sampling, greedy=True)
        rollouts = sample_rollouts(
            self.policy, self.data.tokenizer, mine, 1, greedy, seed=0, step=0
        )
        rewards = [s.reward for s in score_rollouts(self.policy, rollouts, self.reward)]
        total = [value for share in self.topology.gather_over_data(rewards) for value in share]
        return sum(total) / len(total)

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
        tally = Tally()
        sums = Sums()
        trained = 0
        for index in range(count):
            minibatch = [s for found in groups[index * size : (index + 1) * size] for s in found]
            sums = self._accumulate(minibatch, self.loss, self.accumulator)
            update = self.optimizer.step()
            if self.accumulator is not None:
                tally.merge(self._whole_tally(self.accumulator.tally))
            trained += sum(len(sequence.tokens) for sequence in minibatch)
            if index == 0:  # still the policy that the rollouts came from
                metrics |= {
                    "policy/entropy": sums.entropy / sums.tokens,
                    "policy/logprob_mismatch": sums.mismatch / sums.tokens,
                    "policy/logprob_mismatch_max": sums.worst_mismatch,
                }
            metrics |= update
        metrics["policy/kl_rollout"] = sums.kl / sums.tokens
        metrics["loss/policy"] = -sums.objective / sums.tokens
        metrics["tokens/trained"] = float(trained)
        return metrics | tally.metrics()

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
        plan = plan_microbatches(
            [len(sequence.tokens) for sequence in sequences],
            self.config.batching.tokens_per_microbatch,
            replicas=topology.data.size,
            multiple=topology.pipeline.size if topology.virtual_pipeline > 1 else 1,
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

    def _whole_tally(self, tally: Tally) -> Tally:
        """Projection sums over all stages and replicas (tensor ranks all hold the same)."""
        whole = Tally()
        for stage in self.topology.gather_over_stages(tally):
            for replica in self.topology.gather_over_data(stage):
                whole.merge(replica)
        return whole

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
                delta = initial.double()[mask] - microbatch.old_logprobs[mask]
                total += float((torch.expm1(delta) - delta).sum())
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
            update={"lr": warm.lr, "warmup_steps": warm.warmup_steps, "decay": warm.decay}
        )
        optimizer = Optimizer(self.policy, schedule, warm.steps)
        self.reporter.start("warm_start", warm.steps)
        for step in range(1, warm.steps + 1):
            started = time.perf_counter()
            sequences = [
                self.data.supervised.supervised_sequence(prompt.problem)
                for prompt in self.data.supervised.take(warm.sequences_per_step)
            ]
            sums = self._accumulate(
                sequences, LossOptions("supervised"), accumulator=None, temperature=1.0
            )
            metrics = {"loss/supervised": sums.surprise / sums.tokens, **optimizer.step()}
            metrics["seconds/step"] = time.perf_counter() - started
            self.reporter.write(StepReport(step, metrics), "warm_start")

    # ------------------------------------------------------------------ records

    def _describe(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        scored = [sample for found in groups for sample in found.samples]
        rewards = torch.tensor([sample.reward for sample in scored], dtype=torch.float64)
        lengths = [len(sample.rollout.tokens) for sample in scored]
        flat = sum(len({s.reward for s in found.samples}) == 1 for found in groups)
        return {
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std(correction=0)),
            "reward/equal_groups": flat / len(groups),
            "rollout/length": sum(lengths) / len(lengths),
            "rollout/truncated": sum(not s.rollout.finished for s in scored) / len(scored),
        }

    def _samples(self, groups: Sequence[RolloutGroup], step: int) -> tuple[dict[str, Any], ...]:
        """The first rollouts of the step's first groups."""
        chosen = [found.samples[0] for found in groups[: self.config.trainer.log_samples]]
        return tuple(
            {
                "step": step,
                "problem": sample.rollout.prompt.problem.id,
                "prompt": sample.rollout.prompt.text,
                "completion": sample.rollout.text,
                "answer": sample.rollout.prompt.problem.answer,
                "reward": sample.reward,
                "finished": sample.rollout.finished,
            }
            for sample in chosen
        )

    def _save(self) -> None:
        save_checkpoint(
            checkpoint_path(self.run_dir.checkpoints, self.done),
            self.policy,
            self.optimizer,
            {"step": self.done, "prompts": self.prompts_seen},
        )

    def _resume(self) -> None:
        """Load the newest checkpoint and the policy that RL started from."""
        folder = self.run_dir.checkpoints
        newest, first = latest_checkpoint(folder), checkpoint_path(folder, 0)
        if newest is None:
            raise ConfigError(
                f"{folder} holds no complete checkpoint; start again with --overwrite"
            )
        load_checkpoint(first, self.policy, None)
        self.initial = WeightSnapshot(self.policy)
        state = load_checkpoint(newest, self.policy, self.optimizer)
        self.data.train.restore(state["prompts"])
        self.prompts_seen = self.data.train.state()
        self.done = int(state["step"])
