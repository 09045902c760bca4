"""Policies that a step is compared with: for its loss and rewards, and for its metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from proma_megatron.config.run import RunConfig
from proma_megatron.learner.learner import Learner
from proma_megatron.learner.snapshots import WeightSnapshot
from proma_megatron.losses.kl import adapted, estimate
from proma_megatron.losses.mismatch import truncated_weights
from proma_megatron.types import TrainingSequence

RANGE = 1e6  # how far an adaptive coefficient may move

Batch = list[list[TrainingSequence]]  # a step's sequences, by prompt


class ReferencePolicies:
    """What the loss and the rewards need of other policies; nothing where the config asks nothing.

    Attributes:
        coefficient: of the KL penalty; changes from step to step where it has a target.
    """

    def __init__(self, config: RunConfig, learner: Learner) -> None:
        self.config, self.learner = config.loss, learner
        self.coefficient = config.loss.kl.coefficient

    @property
    def in_loss(self) -> float:
        """The coefficient of the penalty in the loss."""
        return self.coefficient if self.config.kl.place == "loss" else 0.0

    @property
    def needed(self) -> bool:
        """Whether a step asks for log-probabilities of other policies, or has a penalty."""
        return self.config.mismatch != "off" or self.config.kl.coefficient > 0

    @property
    def needs_step(self) -> bool:
        """Whether the coefficient follows the divergence of each step."""
        return self.config.kl.target is not None and self.config.kl.reference == "rollout"

    def attach(self, batch: Batch, initial: WeightSnapshot) -> tuple[Batch, dict[str, float]]:
        """Add log-probabilities of the reference to the batch, and weights for the mismatch.

        With ``loss.mismatch`` the trainer's own log-probabilities become those of the sampling
        policy, and the generator's enter only through the weights. On-policy ratios are then
        exactly 1, whatever generates.

        Returns:
            The batch, and metrics of what was found.
        """
        flat = _flat(batch)
        metrics = {"loss/kl_coefficient": self.coefficient} if self.config.kl.coefficient else {}
        if self.config.mismatch != "off":
            own = self.learner.logprobs(flat)
            metrics |= _disagreement(flat, own)
            flat = [self._corrected(s, logprobs) for s, logprobs in zip(flat, own, strict=True)]
            metrics |= self._weights(flat)
        if self.config.kl.coefficient and self.config.kl.reference == "initial":
            with initial.in_place():
                found = self.learner.logprobs(flat)
            flat = [
                replace(s, reference_logprobs=logprobs)
                for s, logprobs in zip(flat, found, strict=True)
            ]
            tokens = max(1, sum(sequence.loss_tokens for sequence in flat))
            metrics["policy/kl_reference"] = sum(self._sum(s) for s in flat) / tokens
        sequences = iter(flat)
        return [[next(sequences) for _ in found] for found in batch], metrics

    def _weights(self, flat: Sequence[TrainingSequence]) -> dict[str, float]:
        weights = [w for s in flat for w in _counted(s, s.token_weights or ())]
        cut = sum(weight >= self.config.mismatch_cap for weight in weights)
        return {
            "policy/mismatch_weight": sum(weights) / max(1, len(weights)),
            "policy/mismatch_truncated": cut / max(1, len(weights)),
        }

    def _corrected(
        self, sequence: TrainingSequence, logprobs: tuple[float, ...]
    ) -> TrainingSequence:
        mode, cap = self.config.mismatch, self.config.mismatch_cap
        own, generators = _counted(sequence, logprobs), _counted(sequence, sequence.old_logprobs)
        weights = iter(truncated_weights(own, generators, mode, cap))
        token_weights = tuple(next(weights) if counts else 0.0 for counts in sequence.loss_mask)
        return replace(sequence, old_logprobs=logprobs, token_weights=token_weights)

    def penalties(self, batch: Batch) -> list[list[float]]:
        """Return what each reward loses to the KL penalty: coefficient times summed estimates."""
        if not self.coefficient or self.config.kl.place != "reward":
            return [[0.0] * len(found) for found in batch]
        return [[self.coefficient * self._sum(s) for s in found] for found in batch]

    def _sum(self, sequence: TrainingSequence) -> float:
        """Add up the estimates of a sequence's tokens."""
        assert sequence.reference_logprobs is not None
        sampled = torch.tensor(_counted(sequence, sequence.old_logprobs), dtype=torch.float64)
        other = torch.tensor(_counted(sequence, sequence.reference_logprobs), dtype=torch.float64)
        return float(estimate(self.config.kl.estimator, sampled, other).sum())

    def adapt(self, metrics: dict[str, float]) -> None:
        """Move the coefficient towards the target, after a step with these metrics.

        It stays within a factor of a million of the first one: beyond it, no target is near.
        """
        kl = self.config.kl
        if kl.target is None:
            return
        found = metrics["policy/kl_step" if self.needs_step else "policy/kl_reference"]
        if not math.isfinite(found) or (self.needs_step and metrics.get("optimizer/skipped")):
            return  # a step that was not made says nothing about how far steps move
        moved = adapted(self.coefficient, found, kl.target)
        self.coefficient = min(max(moved, kl.coefficient / RANGE), kl.coefficient * RANGE)


def _disagreement(
    sequences: Sequence[TrainingSequence], own: Sequence[Sequence[float]]
) -> dict[str, float]:
    """Measure how far the trainer's log-probabilities are from the generator's."""
    differences = [
        abs(mine - theirs)
        for s, logprobs in zip(sequences, own, strict=True)
        for mine, theirs in zip(_counted(s, logprobs), _counted(s, s.old_logprobs), strict=True)
    ]
    return {
        "policy/logprob_mismatch": sum(differences) / max(1, len(differences)),
        "policy/logprob_mismatch_max": max(differences, default=0.0),
    }


def _counted(sequence: TrainingSequence, values: Sequence[float]) -> list[float]:
    """Return the values of the tokens that the loss counts."""
    return [value for value, counts in zip(values, sequence.loss_mask, strict=True) if counts]


def _flat(batch: Batch) -> list[TrainingSequence]:
    return [sequence for found in batch for sequence in found]
