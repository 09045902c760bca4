"""Sample a policy on a set of problems and measure it: for validation and for `proma eval`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from proma_megatron.config.run import RunConfig
from proma_megatron.data.tokenizer import Tokenizer
from proma_megatron.evaluation.statistics import accuracy_interval, mean_pass_at_k
from proma_megatron.model.policy import Policy
from proma_megatron.rewards.pool import Scorer
from proma_megatron.rollout.engine import Interrupt, Interrupted, SamplingOptions
from proma_megatron.rollout.groups import group, sample_rollouts, score_rollouts, shard_for_replica
from proma_megatron.types import Prompt, Rollout, ScoredRollout


@dataclass(frozen=True)
class Evaluation:
    """All completions of an evaluation, a problem's samples side by side."""

    scored: tuple[ScoredRollout, ...]
    samples: int  # of a problem

    def metrics(self) -> dict[str, float]:
        """Return figures over all completions; rates are shares of completions or of problems."""
        n = self.samples
        count = len(self.scored)
        correct = [sum(s.correct for s in self.scored[at : at + n]) for at in range(0, count, n)]
        low, high = accuracy_interval(correct, n)
        found = {
            "accuracy": sum(correct) / count,
            "accuracy_low": low,
            "accuracy_high": high,
            "score": sum(s.score for s in self.scored) / count,
        }
        found |= {f"pass@{k}": mean_pass_at_k(correct, n, k) for k in _doublings(n)}
        return found | {
            "length": sum(len(s.rollout.tokens) for s in self.scored) / count,
            "truncated": sum(not s.rollout.finished for s in self.scored) / count,
            "timeouts": float(sum(s.timed_out for s in self.scored)),
            "problems": float(len(correct)),
        }

    def describe(self) -> str:
        """Put the figures in a line."""
        found = self.metrics()
        passes = "".join(f", {k} {v:.1%}" for k, v in found.items() if k.startswith("pass@"))
        return (
            f"accuracy {found['accuracy']:.1%} (95% interval {found['accuracy_low']:.1%} to "
            f"{found['accuracy_high']:.1%}){passes}; {found['length']:.1f} tokens a completion, "
            f"{found['truncated']:.1%} truncated"
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return one JSON object a completion."""
        return [
            {
                "problem": s.rollout.prompt.problem.id,
                "sample": s.rollout.sample,
                "prompt": s.rollout.prompt.text,
                "completion": s.rollout.text,
                "answer": s.rollout.prompt.problem.answer,
                "score": s.score,
                "correct": s.correct,
                "tokens": len(s.rollout.tokens),
                "finished": s.rollout.finished,
                "timed_out": s.timed_out,
            }
            for s in self.scored
        ]


def _doublings(n: int) -> list[int]:
    """Return 1, 2, 4, ... and n itself."""
    powers = [2**i for i in range(n.bit_length()) if 2**i < n]
    return [*powers, n]


def sampling_options(config: RunConfig) -> SamplingOptions:
    """Return how this configuration evaluates."""
    evaluation, rollout = config.evaluation, config.rollout
    temperature = evaluation.temperature
    if temperature is None:
        temperature = 0.0 if evaluation.samples == 1 else rollout.temperature
    return SamplingOptions(
        temperature=temperature or 1.0,
        top_k=evaluation.top_k,
        top_p=evaluation.top_p,
        max_new_tokens=rollout.max_new_tokens,
        batch_size=rollout.batch_size,
        greedy=temperature == 0,
    )


def evaluate(
    policy: Policy,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    config: RunConfig,
    scorer: Scorer,
    *,
    step: int = 0,
    progress: Callable[[int], None] = lambda done: None,
    look_up: Callable[[], None] = lambda: None,
    interrupt: Interrupt | None = None,
) -> Evaluation:
    """Sample ``evaluation.samples`` completions a prompt and score them; the same on every rank.

    Args:
        step: with the seed and a prompt's place it decides the noise; never that of training.
        progress: called with the number of prompts that are done.
        look_up: called where all ranks are in step; may raise to end the evaluation.
        interrupt: as `generate` takes it; once it was true, ``look_up`` must raise.

    Raises:
        RewardError: the reward function failed on a sample.
    """
    samples, topology = config.evaluation.samples, policy.topology
    options = sampling_options(config)
    # As many at a time as decode together: what is done so far can be told.
    portion = max(1, options.batch_size // samples) * topology.data.size
    scored: list[ScoredRollout] = []
    for first in range(0, len(prompts), portion):
        mine = shard_for_replica(prompts[first : first + portion], topology)
        rollouts: list[Rollout] = []
        with contextlib.suppress(Interrupted):
            rollouts = sample_rollouts(
                policy,
                tokenizer,
                mine,
                samples,
                options,
                seed=config.seed,
                step=~step,
                first=first,
                interrupt=interrupt,
            )
        look_up()
        groups = group(score_rollouts(topology, rollouts, scorer), samples)
        everyone = topology.gather_over_data(groups)
        for place in range(max(map(len, everyone))):
            for replica in everyone:
                if place < len(replica):
                    scored += replica[place].samples
        progress(min(first + portion, len(prompts)))
    return Evaluation(tuple(scored), samples)
