"""What a sample of completions says of a policy: accuracy with its uncertainty, pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959963984540054  # of a 95% interval


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Estimate, without bias, the probability that one of k samples is correct.

    ``1 - C(samples - correct, k) / C(samples, k)`` for ``samples`` of one problem of which
    ``correct`` are.

    Raises:
        ValueError: k is not 1 to ``samples``.

    Source: M. Chen et al., "Evaluating Large Language Models Trained on Code", 2021, eq. 1.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}, expected 1 to {samples} samples")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def mean_pass_at_k(correct: Sequence[int], samples: int, k: int) -> float:
    """Average `pass_at_k` over problems; ``correct`` has one count a problem."""
    return sum(pass_at_k(samples, c, k) for c in correct) / len(correct)


def accuracy_interval(correct: Sequence[int], samples: int) -> tuple[float, float]:
    """Return the 95% confidence interval of the share of correct completions.

    Problems are the independent draws, samples of one problem are not: it is Wilson's interval
    with as many draws as would give the standard error that the problems' shares show (between one
    draw a problem and one a sample). With one sample a problem this is Wilson's interval itself. It
    is never empty, also where all or none are correct.
    """
    problems = len(correct)
    shares = [c / samples for c in correct]
    p = sum(shares) / problems
    draws = float(problems)
    if problems > 1 and 0 < p < 1:
        spread = sum((share - p) ** 2 for share in shares) / problems
        if samples > 1:
            most = float(problems * samples)
            draws = min(most, p * (1 - p) * problems / spread) if spread else most
    center = (p + Z**2 / (2 * draws)) / (1 + Z**2 / draws)
    half = Z / (1 + Z**2 / draws) * math.sqrt(p * (1 - p) / draws + Z**2 / (4 * draws**2))
    # At 0 and 1 the ends meet them but for rounding.
    return min(p, max(0.0, center - half)), max(p, min(1.0, center + half))
