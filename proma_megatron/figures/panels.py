"""What each panel of a figure shows."""

from __future__ import annotations

from typing import NamedTuple


class Panel(NamedTuple):
    key: str  # of metrics.jsonl
    title: str
    short: str  # where there is little room
    unit: str
    noisy: bool = False  # of each step's own few rollouts
    percent: bool = False
    last: int = 1  # measured values that the one at the end is the mean of


ACCURACY = Panel("validation/accuracy", "Validation accuracy", "accuracy", "share of problems")
KL_INITIAL = Panel("policy/kl_initial", "KL to the initial policy", "KL initial", "nats per token")
ENTROPY = Panel(
    "policy/entropy", "Policy entropy", "entropy", "nats per token", noisy=True, last=10
)
KL_LAGGED = Panel(
    "policy/kl_lagged", "KL to the lagged reference", "KL lagged", "nats per token", last=10
)
REWARD = Panel("reward/mean", "Training reward", "reward", "mean reward", noisy=True, last=10)
REMOVED = Panel(
    "projection/removed_energy",
    "Energy removed by the projection",
    "removed",
    "share of gradient energy",
    noisy=True,
    percent=True,
    last=10,
)

PAPER = (ACCURACY, KL_INITIAL, ENTROPY, KL_LAGGED)  # figure 2 of arXiv:2601.10498, (a) to (d)
ALL = (ACCURACY, KL_INITIAL, REWARD, ENTROPY, KL_LAGGED, REMOVED)  # in rows of three
