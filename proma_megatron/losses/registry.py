"""The function of each loss; `config.choices` has what a configuration must know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from proma_megatron.config.choices import LOSSES
from proma_megatron.losses import cispo, gspo, ppo, ratios, reinforce
from proma_megatron.losses.options import LossOptions
from proma_megatron.types import Microbatch


@dataclass(frozen=True)
class Likelihood:
    """A loss ``-u A log pi`` of each token, whose u doesn't know the advantage A."""

    # (ratios (T,), options) -> u (T,), without gradient
    weights: Callable[[torch.Tensor, LossOptions], torch.Tensor]


@dataclass(frozen=True)
class Surrogate:
    """A loss that maximizes a function of each token's ratio and advantage.

    Where it doesn't clip, that function has to be their product.
    """

    # (ratios (T,), advantages (T,), clip_low, clip_high, dual_clip) -> (T,), differentiable
    value: Callable[
        [torch.Tensor, torch.Tensor, float | None, float | None, float | None], torch.Tensor
    ]


# grpo and dr_grpo have PPO's surrogate. GRPO (arXiv:2402.03300, equation 3) differs in advantages
# relative to the group, a KL penalty, and a mean over sequences of means over tokens: keys of their
# own. Dr. GRPO (arXiv:2503.20783, section 3) doesn't divide advantages by a deviation, and sums a
# sequence's tokens over a constant, not its length: what else biases it to long wrong answers and
# to easy or hard prompts.
LOSS_FUNCTIONS: Mapping[str, Likelihood | Surrogate] = {
    "reinforce": Likelihood(lambda r, options: reinforce.token_weights(r, options.importance)),
    "ppo": Surrogate(ppo.clipped_surrogate),
    "grpo": Surrogate(ppo.clipped_surrogate),
    "dr_grpo": Surrogate(ppo.clipped_surrogate),
    "cispo": Likelihood(
        lambda r, options: cispo.token_weights(r, options.clip_low, options.clip_high)
    ),
    "gspo": Surrogate(ppo.clipped_surrogate),  # of gspo.token_ratios
}

_SUPERVISED = Likelihood(lambda r, _: torch.ones_like(r))


def find_loss(kind: str) -> Likelihood | Surrogate:
    """Return the loss of this name.

    Raises:
        ValueError: there is none.
    """
    if kind == "supervised":  # the warm start's; no algorithm has it
        return _SUPERVISED
    if kind not in LOSS_FUNCTIONS:
        raise ValueError(f"unknown loss {kind!r}, expected one of {', '.join(LOSS_FUNCTIONS)}")
    return LOSS_FUNCTIONS[kind]


def ratios_of(
    kind: str, logprobs: torch.Tensor, old: torch.Tensor, microbatch: Microbatch
) -> torch.Tensor:
    """Return the ratios (T,) that this loss is a function of, differentiable in ``logprobs``.

    Args:
        kind: of the loss.
        logprobs: (T,) of the labels under the policy, finite.
        old: (T,) under the policy that sampled, finite.
        microbatch: whose tokens these are.
    """
    if kind in LOSSES and LOSSES[kind].ratio == "sequence":
        return gspo.token_ratios(logprobs, old, microbatch.loss_mask, microbatch.sequences)
    return ratios.token_ratios(logprobs, old)
