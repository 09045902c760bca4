"""The policy's accuracy on the validation split, while it is trained."""

from __future__ import annotations

from proma_megatron.data.loading import RunData
from proma_megatron.evaluation.evaluate import evaluate
from proma_megatron.files import atomic_write, disk_errors, write_rows
from proma_megatron.model.policy import Policy
from proma_megatron.rewards.pool import Scorer
from proma_megatron.training.context import StepContext
from proma_megatron.training.progress import Progress


class Validation:
    """Samples of the policy on the validation split. Every rank has one."""

    def __init__(
        self,
        context: StepContext,
        progress: Progress,
        policy: Policy,
        data: RunData,
        scorer: Scorer,
    ) -> None:
        self.context, self.progress = context, progress
        self.policy, self.data, self.scorer = policy, data, scorer

    def run(self, step: int) -> dict[str, float]:
        """Return accuracy and its kin after this RL step; every completion goes to the disk.

        Raises:
            RewardError: the reward function failed on a sample.
            Stopping: the run is to stop.
        """
        found = evaluate(
            self.policy,
            self.data.tokenizer,
            self.data.validation,
            self.context.config,
            self.scorer,
            step=step,
            look_up=self.progress.raise_if_stopping,
            interrupt=self.context.interrupted,
        )
        if self.context.topology.is_main:
            path = self.context.run_dir.evaluation(step)
            with disk_errors(path), atomic_write(path) as part:
                write_rows(part, found.rows())
        return {f"validation/{name}": value for name, value in found.metrics().items()}
