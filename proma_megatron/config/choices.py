"""Names that a configuration may give, and what goes with each; no function is loaded for it.

Each kind of name has two tables with the same keys: facts here, which checks and the planner read
without torch, and functions in the room that computes with them. Losses have theirs in
`losses/registry.py`, estimators in `advantages/registry.py`, rewards in `rewards/registry.py`.
docs/extending.md shows how to add a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

# --------------------------------------------------------------------------- accumulation


@dataclass(frozen=True)
class AccumulationFacts:
    """An algorithm that is a way of its own to accumulate gradients, with any loss it can carry."""

    default_rule: str
    does: str  # to go on after "..., which"


@dataclass(frozen=True)
class RuleFacts:
    """What happens to gradients while they accumulate."""

    algorithm: str  # a key of ACCUMULATIONS
    # What it changes: what has been accumulated, the microbatch's own gradient, or, unit by unit,
    # the advantages that it is added with. None: nothing, so that Megatron's own accumulation runs.
    acts_on: Literal["accumulated", "microbatch", "advantages"] | None
    # What it is solved from: inner products of sequence gradients, or dominant subspaces of inputs
    # and output gradients, which only Linear layers have.
    solved_from: Literal["gram", "subspaces"] | None


ACCUMULATIONS = {
    "proma": AccumulationFacts(
        "exact", "projects what has been accumulated on the complement of sequence gradients"
    ),
    "intra_proma": AccumulationFacts(
        "subspace", "projects each microbatch's own gradient by dominant subspaces"
    ),
    "isopo": AccumulationFacts(
        "kernel", "projects nothing, but transforms the advantages of a microbatch unit by unit"
    ),
}

RULES = {
    "exact": RuleFacts("proma", acts_on="accumulated", solved_from="gram"),
    "iterative": RuleFacts("proma", acts_on="accumulated", solved_from="gram"),
    "ridge": RuleFacts("proma", acts_on="accumulated", solved_from="gram"),
    "subspace": RuleFacts("intra_proma", acts_on="microbatch", solved_from="subspaces"),
    "norm": RuleFacts("isopo", acts_on="advantages", solved_from="gram"),
    "kernel": RuleFacts("isopo", acts_on="advantages", solved_from="gram"),
    "none": RuleFacts("proma", acts_on=None, solved_from=None),
}


def rules_of(algorithm: str) -> tuple[str, ...]:
    """Return what ``projection.rule`` may be with this algorithm, its default first."""
    if algorithm not in ACCUMULATIONS:
        return ()
    default = ACCUMULATIONS[algorithm].default_rule
    own = (name for name, facts in RULES.items() if facts.algorithm == algorithm)
    return (default, *(name for name in own if name != default))


# --------------------------------------------------------------------------- losses


@dataclass(frozen=True)
class LossFacts:
    """A policy loss, and what the configuration's nulls stand for with it."""

    # (low, high) of the range that ratios are kept within; None: it clips nothing.
    clips: tuple[float, float] | None
    # Whether which tokens are clipped depends on the advantage's sign. A sequence's gradient is
    # then not its advantage times one direction, and no accumulator of ours can carry it.
    sign_dependent: bool
    ratio: Literal["token", "sequence"] = "token"  # what is clipped
    dual_clip: bool = False  # whether a second clip is defined, for negative advantages
    # As in the papers of gspo and dr_grpo; a mean over tokens, as in PROMA's published runs.
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"] = "token_mean"


# PPO's and GRPO's 0.2; GSPO's from its section 5.1 (arXiv:2507.18071); CISPO (arXiv:2506.13585)
# clips above only.
LOSSES = {
    "reinforce": LossFacts(clips=None, sign_dependent=False),
    "ppo": LossFacts(clips=(0.2, 0.2), sign_dependent=True, dual_clip=True),
    "grpo": LossFacts(clips=(0.2, 0.2), sign_dependent=True, dual_clip=True),
    "dr_grpo": LossFacts(
        clips=(0.2, 0.2), sign_dependent=True, dual_clip=True, aggregation="sequence_sum"
    ),
    "cispo": LossFacts(clips=(1.0, 0.2), sign_dependent=False),
    "gspo": LossFacts(
        clips=(3e-4, 4e-4), sign_dependent=True, ratio="sequence", aggregation="sequence_mean"
    ),
}

# An algorithm is a way to accumulate, or a loss that is accumulated as Megatron does.
ALGORITHMS = (*ACCUMULATIONS, *LOSSES)


# --------------------------------------------------------------------------- advantages


@dataclass(frozen=True)
class EstimatorFacts:
    """A way from rewards to advantages."""

    normalizes: bool = False  # whether it divides by a standard deviation where that is left open
    can_normalize: bool = True
    samples: int = 2  # of a prompt, at least
    samples_to_normalize: int = 2  # at least, where it divides


ESTIMATORS = {
    "group": EstimatorFacts(),
    "rloo": EstimatorFacts(can_normalize=False),
    "leave_one_out": EstimatorFacts(samples_to_normalize=3),  # by the deviation of the others
    "reinforce_plus_plus": EstimatorFacts(normalizes=True),
    "stratified": EstimatorFacts(),
}


# --------------------------------------------------------------------------- rewards


@dataclass(frozen=True)
class RewardFacts:
    """A built-in reward function."""

    # Whether the trainer scores with it itself: it takes microseconds, whatever the text. Others
    # run in processes of their own, which a time limit can end.
    quick: bool = False
    imports: str | None = None  # a module that takes seconds to import, so once for all processes


REWARDS = {
    "gsm8k": RewardFacts(quick=True),
    "math": RewardFacts(imports="math_verify"),
}


# --------------------------------------------------------------------------- in sentences


def either(names: Iterable[str]) -> str:
    """Return the names as "a", "a or b", or "a, b or c"."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def expected_reward() -> str:
    """Return what ``reward.function`` may be."""
    return either([*(f"'{name}'" for name in REWARDS), "'package.module:function'"])
