"""Which loss a backward pass carries."""

from __future__ import annotations

from dataclasses import dataclass

CLIPPED = ("ppo", "grpo", "dr_grpo", "gspo")  # on one side for each sign of the advantage


@dataclass(frozen=True)
class LossOptions:
    """Which loss a backward pass carries; `loss.policy_loss` has the formulas."""

    kind: str  # "reinforce", "ppo", "grpo", "dr_grpo", "cispo", "gspo" or "supervised"
    unit: bool = False  # leave the advantages out, for the accumulator to multiply with
    importance: bool = False  # reinforce: the unclipped, detached ratio to the rollout policy
    clip_low: float | None = 0.2  # None: no clipping
    clip_high: float | None = 0.2
    dual_clip: float | None = None
    entropy: float = 0.0  # coefficient of the bonus
    kl: float = 0.0  # coefficient of the penalty
    kl_estimator: str = "k3"  # "k1", "k2" or "k3"
    kl_reference: str = "initial"  # or "rollout"

    @property
    def clips(self) -> bool:
        """Whether there is a clipping range that acts."""
        bounded = self.clip_low is not None or self.clip_high is not None
        return bounded and self.kind in (*CLIPPED, "cispo")


UNIT = LossOptions("reinforce", unit=True)  # unit losses without any weights
REINFORCE = LossOptions("reinforce")
SUPERVISED = LossOptions("supervised")  # cross-entropy of the masked tokens
