"""Keys of what is optimized: advantages, loss, projection, batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from proma_megatron.config.choices import RULES
from proma_megatron.config.fields import (
    Estimator,
    Fraction,
    LossKind,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Rule,
    Section,
)


class AdvantageConfig(Section):
    """How rewards become advantages; `advantages/` has the formulas."""

    estimator: Estimator = Field(
        default="group", description="Which estimator, see the guide's page on algorithms."
    )
    normalize_std: bool | None = Field(
        default=None,
        description=(
            "Divide by the standard deviation: of the group (group, stratified: of the "
            "stratum), of the other samples (leave_one_out). Null: only reinforce_plus_plus "
            "does, by the batch's."
        ),
    )
    stratum: Literal["finished", "timed_out", "length"] = Field(
        default="length", description="Key of a sample that stratified compares within."
    )
    blend: Annotated[float, Field(ge=0, le=1)] = Field(
        default=1.0,
        description="stratified: the share of its own advantage; the rest is the group's.",
    )


class KLConfig(Section):
    """A penalty on the divergence from a reference policy; the coefficient 0 turns it off.

    With ``target`` the coefficient is halved after a step whose divergence was below target / 1.5,
    and doubled after one above 1.5 * target (PPO, arXiv:1707.06347, section 4).
    """

    coefficient: NonNegativeFloat = Field(default=0.0, description="Of the penalty; 0: off.")
    estimator: Literal["k1", "k2", "k3"] = Field(
        default="k3", description="Estimator of the divergence from single tokens."
    )
    place: Literal["loss", "reward"] = Field(
        default="loss", description="Whether it is a term of the loss, or taken from the reward."
    )
    reference: Literal["initial", "rollout"] = Field(
        default="initial",
        description=(
            "initial: the policy that RL started from; rollout: the one that sampled, as PPO does."
        ),
    )
    target: PositiveFloat | None = Field(
        default=None, description="Divergence that the coefficient is adapted to; null: it stays."
    )


class LossConfig(Section):
    """The policy loss. Null stands for the algorithm's own, see `choices.py`."""

    kind: LossKind | None = Field(
        default=None,
        description=(
            "proma, intra_proma and isopo take reinforce, or another that their accumulation "
            "can carry."
        ),
    )
    importance: Literal["auto", "on", "off"] = Field(
        default="auto",
        description=(
            "reinforce: weight tokens by the unclipped ratio to the rollout policy. auto does "
            "so when a rollout batch is split into several minibatches; the first update of a "
            "batch is on-policy."
        ),
    )
    clip: bool = Field(
        default=True, description="False: the unclipped surrogate, as with PPO's KL penalty."
    )
    clip_low: NonNegativeFloat | None = Field(
        default=None, description="Clips the ratio at 1 - clip_low from below."
    )
    clip_high: NonNegativeFloat | None = Field(
        default=None, description="Clips the ratio at 1 + clip_high from above."
    )
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = Field(
        default=None,
        description=(
            "Bounds the loss at this multiple of the advantage where that is negative; null: off."
        ),
    )
    ratio: Literal["token", "sequence"] | None = Field(
        default=None, description="What is clipped: the ratio of a token or of a sequence."
    )
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"] | None = Field(
        default=None, description="How token losses become one number."
    )
    aggregation_constant: PositiveFloat | None = Field(
        default=None,
        description=(
            "sequence_sum: what the sum of a sequence's tokens is divided by; null: max_new_tokens."
        ),
    )
    entropy: NonNegativeFloat = Field(default=0.0, description="Coefficient of the entropy bonus.")
    kl: KLConfig = Field(
        default=KLConfig(), description="A penalty on the divergence from a reference policy."
    )
    mismatch: Literal["off", "token", "sequence"] = Field(
        default="off",
        description=(
            "Weight tokens by pi_trainer / pi_generator of the sampling policy, truncated at "
            "mismatch_cap, by token or by sequence; the trainer's log-probabilities cost a "
            "forward pass a step."
        ),
    )
    mismatch_cap: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        default=2.0, description="Largest such weight."
    )


class ProjectionConfig(Section):
    """What happens to gradients while they accumulate; `rule: none` is Megatron's own way.

    exact, iterative and ridge are PROMA's: they project what has been accumulated. subspace is
    Intra-PROMA's: it projects the microbatch's own gradient. norm and kernel are ISOPO's: they
    change the advantages of a microbatch by unit. Only what a rule uses counts.
    """

    rule: Rule = Field(
        default="exact", description="Which rule; in a run without one: the algorithm's own."
    )
    bound: NonNegativeFloat | None = Field(
        default=0.5,
        description=(
            "Removed part at most bound * |P|, P the microbatch's own gradient; null: unbounded."
        ),
    )
    rank: PositiveInt = Field(
        default=8, description="subspace: dimension of each dominant subspace."
    )
    sides: Literal["both", "input", "output"] = Field(
        default="both", description="subspace: whose directions are removed."
    )
    regularization: PositiveFloat = Field(
        default=1.0, description="kernel, norm: relative to the mean eigenvalue of K."
    )
    shrinkage: Annotated[float, Field(ge=0, le=1)] = Field(
        default=1.0, description="Share of the removed part that is removed."
    )
    parameters: Literal["all", "linear"] = Field(
        default="all",
        description="Which parameters are projected; linear: weights of linear layers only.",
    )
    unit: Literal["huggingface", "megatron"] = Field(
        default="huggingface",
        description=(
            "What is projected together: tensors as Hugging Face names them, or as Megatron "
            "fuses them."
        ),
    )
    data_parallel: Literal["replica"] = Field(
        default="replica",
        description=(
            "With several replicas: each runs its own chain over its microbatches, and the "
            "chains are added."
        ),
    )
    workspace_mb: PositiveInt = Field(
        default=512, description="Half for sequence gradients of one layer, half for blocks."
    )
    gradients: Literal["auto", "materialize", "stream"] = Field(
        default="auto",
        description=(
            "Sequence gradients of a weight: kept until the layer is solved where they fit "
            "(materialize), formed in passing (stream), or what was measured to be faster "
            "(auto)."
        ),
    )

    fp8_operands: Literal["bfloat16", "fp8"] = Field(
        default="bfloat16",
        description=(
            "With model.fp8: what sequence gradients are formed from, inputs and output "
            "gradients of layers as they were, or as FP8 has them."
        ),
    )
    fp8_gate_every: NonNegativeInt = Field(
        default=50,
        description=(
            "With model.fp8: steps between comparisons of one microbatch's K and c from both "
            "kinds of operands; 0: only the first step."
        ),
    )
    fp8_gate_beta: PositiveFloat = Field(
        default=0.2, description="Warn when the median relative error of beta is above this."
    )
    fp8_gate_cosine: Fraction = Field(
        default=0.99,
        description="Warn when the cosine between both accumulated gradients is below this.",
    )

    @property
    def acts_alone(self) -> bool:
        """Whether the rule changes a microbatch's own gradient, whatever came before it."""
        return RULES[self.rule].acts_on in ("microbatch", "advantages")

    @property
    def by_subspaces(self) -> bool:
        """Whether the rule works on Linear layers' inputs and output gradients, without K."""
        return RULES[self.rule].solved_from == "subspaces"

    @property
    def active(self) -> bool:
        """Whether anything can change; if not, Megatron's own accumulation runs."""
        acts_on = RULES[self.rule].acts_on
        if acts_on == "advantages":
            return True
        return acts_on is not None and self.shrinkage > 0 and self.bound != 0


class BatchingConfig(Section):
    tokens_per_microbatch: PositiveInt = Field(
        default=1024, description="Largest number of tokens of a microbatch."
    )
    sequences_per_microbatch: PositiveInt | None = Field(
        default=None,
        description=(
            "Consecutive sequences instead of a token budget: with samples_per_prompt of them, "
            "a microbatch is one prompt's group. Null: the token budget."
        ),
    )
    minibatches: PositiveInt = Field(default=1, description="Optimizer steps per rollout batch.")
    zero_advantage: Literal["keep", "drop"] = Field(
        default="keep",
        description=(
            "A sequence of advantage 0 adds nothing to the policy loss, but what others "
            "accumulated is made orthogonal to it, as in the paper. drop saves its forward and "
            "backward; entropy and mismatch are then measured on the others only."
        ),
    )
