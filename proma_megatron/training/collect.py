"""From a step's prompts to scored groups of rollouts: sampled, scored, and chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from proma_megatron.data.loading import RunData
from proma_megatron.errors import RewardError
from proma_megatron.files import disk_errors, write_rows
from proma_megatron.model.policy import Policy
from proma_megatron.rewards.pool import Scorer
from proma_megatron.rollout.engine import Interrupted, SamplingOptions
from proma_megatron.rollout.groups import (
    group,
    rollout_metrics,
    sample_rollouts,
    score_rollouts,
    shard_for_replica,
)
from proma_megatron.rollout.selection import choose, informative
from proma_megatron.training.context import StepContext
from proma_megatron.types import Prompt, Rollout, RolloutGroup


class Collector:
    """Rollouts of the run's current policy, for training. Every rank has one."""

    def __init__(self, context: StepContext, policy: Policy, data: RunData, scorer: Scorer) -> None:
        self.context, self.config, self.run_dir = context, context.config, context.run_dir
        self.policy, self.topology = policy, policy.topology
        self.data, self.scorer = data, scorer
        rollout = self.config.rollout
        self.sampling = SamplingOptions(
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            max_new_tokens=rollout.max_new_tokens,
            batch_size=rollout.batch_size,
        )

    def collect(
        self, step: int, look_up: Callable[[], None]
    ) -> tuple[list[RolloutGroup], dict[str, float]]:
        """Return scored groups of the step, as many as it has prompts, and what they were like.

        With ``rollout.resampling_rounds`` groups whose rewards are all equal, which teach nothing,
        are replaced by those of further prompts while rounds last; the metrics are of everything
        that was sampled.

        Args:
            look_up: called where all ranks are in step; may raise to end the run.

        Raises:
            RewardError: the reward function failed; the rollouts are written down first.
        """
        wanted, sampled, found = self.config.rollout.prompts_per_step, [], 0
        for taken in range(1 + self.config.rollout.resampling_rounds):
            prompts = self.data.train.take(wanted)
            with self.context.phase("rollout"):
                rollouts = self._generate(prompts, step, first=taken * wanted)
            look_up()
            with self.context.phase("score"):
                sampled += self._score(rollouts, step)
            found = len(informative(sampled))
            if found >= wanted:
                break
        metrics = rollout_metrics(sampled)
        if self.config.rollout.resampling_rounds:
            metrics["rollout/rounds"] = len(sampled) / wanted
            metrics["rollout/informative"] = min(found, wanted) / wanted
        return choose(sampled, wanted), metrics

    def _generate(self, prompts: Sequence[Prompt], step: int, first: int) -> list[Rollout]:
        """Roll out this replica's share of the prompts; none if it is to stop meanwhile."""
        try:
            return sample_rollouts(
                self.policy,
                self.data.tokenizer,
                shard_for_replica(prompts, self.topology),
                self.config.rollout.samples_per_prompt,
                self.sampling,
                seed=self.config.seed,
                step=step,
                first=first,
                interrupt=self.context.interrupted,
            )
        except Interrupted:
            return []  # all replicas agree on it next

    def _score(self, rollouts: list[Rollout], step: int) -> list[RolloutGroup]:
        """Score groups of all replicas, in the order of the prompts, on every rank."""
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
            path = self.run_dir.unscored(step)
            with disk_errors(path):
                write_rows(path, rows)
