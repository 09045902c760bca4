"""How far the policy has gone from others: initial, last step, lagged mean."""

from __future__ import annotations

from collections.abc import Sequence

from proma_megatron.config.run import RunConfig
from proma_megatron.learner.learner import Learner
from proma_megatron.learner.references import (
    Batch,
    _flat,
)
from proma_megatron.learner.snapshots import LaggedMean, WeightSnapshot
from proma_megatron.types import TrainingSequence


class Divergences:
    """KL to earlier policies, measured on a step's rollouts, as in figure 2 of arXiv:2601.10498.

    Each is one forward pass over the step's sequences, unless a penalty has made the same one, and
    the k3 estimate of the KL per token:

    - ``policy/kl_initial``: from the policy that RL started from;
    - ``policy/kl_lagged``: from the mean of the weights of the ``trainer.lag_steps`` policies
      before. The paper says "running mean over 40 steps" and no more; this is a mean of parameters;
    - ``policy/kl_step``: of the policy after the step from the policy before.

    What samples is always the policy before the step: KL(sampling policy, other).
    """

    def __init__(self, config: RunConfig, learner: Learner, of_every_step: bool = False) -> None:
        """Measure the divergences of a run.

        Args:
            of_every_step: the divergence of each step is needed, due or not.
        """
        self.config, self.learner = config.trainer, learner
        self.of_every_step = of_every_step
        self.initial: WeightSnapshot | None = None
        self.lagged: LaggedMean | None = None
        if self.config.kl_lagged_every:
            self.lagged = LaggedMean(learner.policy, self.config.lag_steps)

    def to_lagged(self, step: int, batch: Batch, joined: bool = False) -> dict[str, float]:
        """Measure KL to earlier steps' policies before training; the current one then joins them.

        The first step has no earlier policy: its own, the initial one, stands in for it.

        Args:
            joined: whether the current weights have joined before, as no update was made since.
        """
        if self.lagged is None:
            return {}
        if self.lagged.count == 0:
            self.lagged.add()
            if step > 1:
                return {}  # the run began without keeping the policies before this one
        found: dict[str, float] = {}
        if due(step, self.config.kl_lagged_every, self.config.steps):
            with self.lagged.in_place():
                found["policy/kl_lagged"] = self.learner.divergence(_flat(batch))
        if step > 1 and not joined:
            self.lagged.add()
        return found

    def looks_back(self, step: int) -> bool:
        """Tell whether `after_step` measures anything."""
        return self._initial_due(step) or self._step_due(step)

    def after_step(self, step: int, batch: Batch) -> dict[str, float]:
        """Measure KL to the initial policy and of the step after training, where they are due."""
        found: dict[str, float] = {}
        if self._step_due(step):
            found["policy/kl_step"] = self.learner.divergence(_flat(batch))
        if self._initial_due(step):
            found["policy/kl_initial"] = self._to_initial(_flat(batch))
        return found

    def _to_initial(self, sequences: Sequence[TrainingSequence]) -> float:
        if all(sequence.reference_logprobs is not None for sequence in sequences):
            # The reference of a KL penalty is that very policy: it was asked before the step.
            return self.learner.divergence_of_reference(sequences)
        assert self.initial is not None
        with self.initial.in_place():
            return self.learner.divergence(sequences)

    def _initial_due(self, step: int) -> bool:
        return due(step, self.config.kl_every, self.config.steps)

    def _step_due(self, step: int) -> bool:
        every = self.config.kl_step_every
        return self.of_every_step or (every > 0 and due(step, every, self.config.steps))


def due(step: int, every: int, last: int) -> bool:
    """Tell whether something done every so many steps, and after the last, is done now."""
    return step == last or (every > 0 and step % every == 0)
