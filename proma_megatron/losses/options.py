"""Which loss a backward pass carries."""

from __future__ import annotations

from dataclasses import dataclass

from proma_megatron.config.choices import LOSSES
from proma_megatron.config.sections import RunSections, loss_kind


@dataclass(frozen=True)
class LossOptions:
    """Which loss a backward pass carries; `loss.policy_loss` has the formulas."""

    kind: str  # of `choices.LOSSES`, or "supervised"
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
        return bounded and self.kind in LOSSES and LOSSES[self.kind].clips is not None


UNIT = LossOptions("reinforce", unit=True)  # unit losses without any weights
REINFORCE = LossOptions("reinforce")
SUPERVISED = LossOptions("supervised")  # cross-entropy of the masked tokens


def loss_options(config: RunSections) -> LossOptions:
    """Return the policy loss of this run, with everything that the configuration leaves open."""
    loss, kind = config.loss, loss_kind(config)
    low, high = LOSSES[kind].clips or (None, None)
    split = config.batching.minibatches > 1
    return LossOptions(
        kind=kind,
        unit=config.projects,
        importance=loss.importance == "on" or (loss.importance == "auto" and split),
        clip_low=(low if loss.clip_low is None else loss.clip_low) if loss.clip else None,
        clip_high=(high if loss.clip_high is None else loss.clip_high) if loss.clip else None,
        dual_clip=loss.dual_clip,
        entropy=loss.entropy,
        kl=loss.kl.coefficient if loss.kl.place == "loss" else 0.0,
        kl_estimator=loss.kl.estimator,
        kl_reference=loss.kl.reference,
    )


def aggregation(config: RunSections) -> tuple[str, float]:
    """Return how token losses become one number, and the constant of ``sequence_sum``."""
    chosen = config.loss.aggregation or LOSSES[loss_kind(config)].aggregation
    constant = config.loss.aggregation_constant or float(config.rollout.max_new_tokens)
    return chosen, constant
